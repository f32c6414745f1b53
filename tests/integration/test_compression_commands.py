"""`trident-export prune` and `distill` as a person runs them: what comes out is exported, gated and served."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from tests import tiny_models
from tests.conftest import ROOT, run_export, run_export_cold
from trident_client import Client
from trident_export import corpora
from trident_serving.launcher import local

TEXT = "\n\n".join([*corpora.calibration("", 1000, 0), *corpora.passages()])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_models.make_causal(tmp_path / "llama", "llama")
    tiny_models.make_reader(tmp_path / "vectors", "bert", AutoModel)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "models.toml").write_text(
        '[llama]\ntask = "text-generation"\nsource = { path = "llama" }\nvariants = ["fp32", "int8"]\n'
        "limits = { context = 96, slots = 2, threads = 1 }\n\n"
        '[vectors]\ntask = "feature-extraction"\nsource = { path = "vectors" }\nvariants = ["fp32"]\n'
        'limits = { dimensions = 32, max_tokens = 96, threads = 1 }\nprompts = { query = "ask: " }\n'
    )
    return tmp_path


def options(folder: Path) -> tuple[str, ...]:
    return ("--models-file", str(folder / "models.toml"), "--reports", str(folder / "reports"))


def printed_tables(stdout: str) -> str:
    return stdout.split("# for models.toml:\n")[1]


@pytest.mark.parametrize(
    ("method", "sparsity"),
    [
        pytest.param("heads", "0.5", marks=pytest.mark.slow),
        pytest.param("columns", "0.33", marks=pytest.mark.slow),
        ("layers", "0.5"),
    ],
)
def test_a_pruned_generator_is_exported_and_served(folder: Path, method: str, sparsity: str) -> None:
    done = run_export(
        "prune", "llama", "--method", method, "--sparsity", sparsity, "--variant", "fp32",
        "--output", str(folder / "pruned"), *options(folder),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    whole, pruned = json.loads((folder / "reports/prune.json").read_text())
    assert whole["kl"] < 1e-6 < 1e-3 < pruned["kl"]
    assert pruned["perplexity"] != whole["perplexity"]
    assert pruned["hf_perplexity"] == whole["hf_perplexity"]
    assert pruned["size_mib"] < 0.97 * whole["size_mib"]
    assert pruned["zipped_mib"] < 0.97 * whole["zipped_mib"]
    assert "<!-- sparsity -->" in (folder / "reports/prune.svg").read_text()
    table = printed_tables(done.stdout)
    (name,) = tomllib.loads(table)
    assert name == f"llama-{method}-{100 * float(sparsity):.0f}"
    (folder / "models.toml").write_text(table)
    repository = folder / "repository"
    exported = run_export("export", "--models-file", str(folder / "models.toml"), "--repository", str(repository))
    assert exported.returncode == 0, exported.stderr
    reference = AutoModelForCausalLM.from_pretrained(folder / "pruned" / "llama" / name.removeprefix("llama-")).eval()
    tokenizer = tiny_models.byte_level_tokenizer()
    with torch.inference_mode():
        ids = tokenizer("the cat", return_tensors="pt").input_ids
        expected = reference.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    with local.running(repository, folder / "log") as server, Client(server.grpc_url) as client:
        assert client.generate("the cat", model=name, max_tokens=8).text == tokenizer.decode(
            expected, skip_special_tokens=True
        )


@pytest.mark.slow
def test_zeros_make_a_graph_that_compresses_and_is_as_large(folder: Path) -> None:
    done = run_export_cold(
        "prune", "vectors", "--method", "wanda", "--experimental", "--sparsity", "0.2", "0.6",
        "--output", str(folder / "pruned"), *options(folder),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "reports/prune.json").read_text())
    assert [row["sparsity"] for row in rows] == pytest.approx([0, 0.2, 0.6], abs=0.03)
    assert rows[0]["mean_cosine"] > rows[1]["mean_cosine"] > rows[2]["mean_cosine"]
    assert rows[0]["zipped_mib"] > rows[1]["zipped_mib"] > rows[2]["zipped_mib"]
    assert rows[0]["size_mib"] == pytest.approx(rows[2]["size_mib"], rel=0.01)
    assert "ONNX Runtime multiplies by them as by any other weight." in done.stdout
    tables = tomllib.loads(printed_tables(done.stdout))
    assert list(tables) == ["vectors-wanda-20", "vectors-wanda-60"]
    assert tables["vectors-wanda-60"]["prompts"] == {"query": "ask: "}


def test_impossible_prunings_leave_nothing(folder: Path) -> None:
    (folder / "empty.txt").write_text("\n")
    for arguments, message in (
        (("--method", "layers", "--sparsity", "0.1"), "takes 0 of 2 layers"),
        (("--method", "2:4", "--sparsity", "0.5"), "choose heads, columns, layers, or add --experimental"),
        (("--method", "2:4", "--experimental", "--sparsity", "0.3"), "sparsity must be 0.5"),
        (("--method", "heads", "--sparsity", "0.5", "--text", str(folder / "empty.txt")), "empty.txt has no text"),
        (("--method", "heads", "--sparsity", "0.5", "--variant", "int7"), "there is no recipe 'int7'"),
    ):
        done = run_export("prune", "llama", *arguments, "--output", str(folder / "pruned"), *options(folder))
        assert done.returncode == 1
        assert message in done.stderr
    assert not (folder / "pruned").exists()


def test_a_student_learns_and_goes_on_after_a_kill(folder: Path) -> None:
    output = folder / "student"
    arguments = [
        "distill", "llama", "--student", "1", "--text", str(folder / "text.txt"), "--output", str(output),
        "--steps", "60", "--batch-size", "4", "--length", "32", "--save-every", "5", "--learning-rate", "0.002",
        *options(folder),
    ]  # fmt: skip
    command = [sys.executable, "-m", "trident_export", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "step 20 of 60" in line:
                process.send_signal(signal.SIGKILL)
                break
    assert process.wait() == -signal.SIGKILL
    assert not output.exists()

    other = run_export(*arguments[:-2], "--temperature", "3", *arguments[-2:])
    assert other.returncode == 1
    assert "holds the checkpoints of another run (temperature was 2.0)" in other.stderr

    done = run_export(*arguments)
    assert done.returncode == 0, done.stderr
    begun = next(line for line in done.stderr.splitlines() if "goes on behind step" in line)
    assert int(begun.split()[-1]) in range(10, 25)
    report = json.loads((folder / "reports/distill.json").read_text())
    assert report["teacher"]["kl"] == pytest.approx(0, abs=1e-6)
    assert report["after"]["kl"] < 0.8 * report["before"]["kl"]
    assert report["after"]["steps"] == 60
    assert not output.with_name("student.training").exists()

    (folder / "models.toml").write_text(printed_tables(done.stdout))
    exported = run_export(
        "export", "--models-file", str(folder / "models.toml"), "--repository", str(folder / "repository")
    )
    assert exported.returncode == 0, exported.stderr
    assert "fp32: passed" in exported.stderr


def test_a_students_time_can_be_bounded(folder: Path) -> None:
    started = time.monotonic()
    done = run_export(
        "distill", "vectors", "--student", "1", "--text", str(folder / "text.txt"), "--output", str(folder / "student"),
        "--steps", "100000", "--minutes", "0.05", "--batch-size", "4", "--learning-rate", "0.001", *options(folder),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 60
    report = json.loads((folder / "reports/distill.json").read_text())
    assert 1 <= report["after"]["steps"] < 100000
    assert report["after"]["kl"] < report["before"]["kl"]


def test_impossible_distillations(folder: Path) -> None:
    (folder / "short.txt").write_text("Too short.")
    (folder / "deepspeed.json").write_text("{}")
    common = ("distill", "llama", "--output", str(folder / "student"), *options(folder))
    for arguments, message in (
        (("--student", "5", "--text", str(folder / "text.txt")), "1 to 1: found 5"),
        (("--student", "1", "--text", str(folder / "short.txt")), "the text gives 0 chunks of 128 tokens"),
        (("--student", "1", "--text", str(folder / "none.txt")), "none.txt"),
        (
            ("--student", "1", "--text", str(folder / "text.txt"), "--deepspeed", str(folder / "deepspeed.json")),
            "--deepspeed needs the package deepspeed",
        ),
    ):
        done = run_export(*common, *arguments)
        assert done.returncode == 1, done.stderr
        assert message in done.stderr
    assert not list(folder.glob("student*"))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_a_model_is_compressed_to_a_budget(folder: Path, variant: str) -> None:
    done = run_export(
        "compress", "llama", "--method", "columns", "--parameters", "90%", "--points", "1", "--variant", variant,
        "--text", str(folder / "text.txt"), "--steps", "40", "--batch-size", "4", "--length", "32",
        "--learning-rate", "0.002", "--output", str(folder / "compressed"), *options(folder),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "reports/compress.json").read_text())
    whole, pruned, trained = rows.values()
    assert [name.rpartition(" ")[2] for name in rows] == ["whole", "pruned", "trained"]
    assert pruned["parameters_m"] == trained["parameters_m"] <= 0.9 * whole["parameters_m"]
    assert whole["kl"] < trained["kl"] < 0.9 * pruned["kl"]
    assert trained["size_mib"] < whole["size_mib"]
    assert trained["step_ms"] > 0
    ((name, table),) = tomllib.loads(printed_tables(done.stdout)).items()
    assert table["default_variant"] == variant
    reached = AutoModelForCausalLM.from_pretrained(folder / "compressed" / "llama" / name.removeprefix("llama-"))
    assert reached.num_parameters() == pytest.approx(1e6 * trained["parameters_m"])
    assert [path.name for path in (folder / "compressed" / "llama").iterdir()] == [name.removeprefix("llama-")]


def test_impossible_budgets(folder: Path) -> None:
    common = ("compress", "llama", "--text", str(folder / "text.txt"), "--output", str(folder / "out"))
    for arguments, message in (
        (("--parameters", "10%"), "can't be met: with all removed that can be, "),
        (("--parameters", "1B"), "which is within the budget: nothing is left to do"),
        (("--latency", "fast"), "--latency must be a number like 12.5, in milliseconds, or 80%, found 'fast'"),
        (("--parameters", ""), "--parameters must be a number like 110M, or 80%, found ''"),
        (("--parameters", "90%", "--points", "0"), "--points must be 1 or more, found 0"),
    ):
        done = run_export(*common, *arguments, *options(folder))
        assert done.returncode == 1, done.stderr
        assert message in done.stderr
    done = run_export(*common, "--parameters", "90%", *options(folder)[:2], "--reports", str(folder / "text.txt"))
    assert (done.returncode, "text.txt is a file, and a folder is needed there" in done.stderr) == (1, True)
    assert not (folder / "out").exists()
