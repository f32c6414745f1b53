"""Training by the real DeepSpeed: two processes on CPUs, every ZeRO stage, against the same run without it.

`make clients` makes an environment with the package, which needs a C++ compiler at its first run, and finds torch and
the others in this one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests import environments, tiny_models
from tests.conftest import ROOT
from trident_export import corpora
from trident_serving.launcher import local

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]
# What DeepSpeed imports beside torch, and this environment does not have.
PACKAGES = ("deepspeed==0.19.8", "einops", "hjson", "msgpack", "ninja", "py-cpuinfo")
STAGES = (1, 2, 3)
IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(scope="session")
def python() -> Path:
    """An interpreter with DeepSpeed; TRIDENT_DEEPSPEED_PYTHON names one, or it is made in .cache."""
    if named := os.environ.get("TRIDENT_DEEPSPEED_PYTHON"):
        return Path(named)
    folder = ROOT / ".cache" / "clients" / "deepspeed"
    made = folder / "packages.txt"
    if not made.exists() or made.read_text(encoding="utf-8").split() != list(PACKAGES):
        found = environments.make(sys.executable, folder)
        environments.install(found, "setuptools", "wheel")
        site = next((folder / "lib").glob("python*")) / "site-packages"
        ours = sysconfig.get_path("purelib")
        (site / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n", encoding="utf-8")
        environments.install(found, "--no-deps", "--no-build-isolation", *PACKAGES)
        made.write_text("\n".join(PACKAGES), encoding="utf-8")
    return folder / "bin/python"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("deepspeed")
    tiny_models.make_causal(root / "llama", "llama")
    tiny_models.make_reader(root / "vectors", "bert", AutoModel, hidden_dropout_prob=0.0)
    (root / "text.txt").write_text("\n\n".join([*corpora.calibration("", 1000, 0), *corpora.passages()]))
    (root / "models.toml").write_text(
        '[llama]\ntask = "text-generation"\nsource = { path = "llama" }\nvariants = ["fp32"]\n'
        "limits = { context = 96, slots = 2, threads = 1 }\n\n"
        '[vectors]\ntask = "feature-extraction"\nsource = { path = "vectors" }\nvariants = ["fp32"]\n'
        "limits = { dimensions = 32, max_tokens = 96, threads = 1 }\n"
    )
    places = ("garden", "house", "river", "street", "church", "field", "window", "table", "door", "sea")
    rows = [
        {"text": f"The {word} of the {place}", "label": word} for place in places for word in ("king", "queen", "child")
    ]
    (root / "classes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for stage in STAGES:
        (root / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return root


def command(python: Path, processes: int, *arguments: str) -> list[str]:
    """`trident-export` in so many processes; 0: without a launcher."""
    if not processes:
        return [str(python), "-m", "trident_export", *arguments]
    (port,) = local.free_ports(1)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    return [str(python), *launcher, "-m", "trident_export", *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(words: list[str]) -> str:
    """What it said."""
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def losses(said: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([\d.e+-]+)", said)]


def distilling(folder: Path, name: str, *more: str, batch_size: int = 4) -> list[str]:
    return [
        "distill", "llama", "--student", "1", "--text", str(folder / "text.txt"), "--output", str(folder / name),
        "--steps", "40", "--batch-size", str(batch_size), "--length", "32", "--learning-rate", "0.002",
        "--models-file", str(folder / "models.toml"), "--reports", str(folder / f"{name}-reports"), *more,
    ]  # fmt: skip


def answer(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def plain(python: Path, folder: Path) -> list[float]:
    """The losses of two processes without DeepSpeed, whose student is in `plain`."""
    found = losses(run(command(python, 2, *distilling(folder, "plain"))))
    assert len(found) == 4
    assert found[0] > 1.1 * found[-1]
    return found


def test_two_processes_learn_as_one_does(python: Path, folder: Path, plain: list[float]) -> None:
    alone = losses(run(command(python, 0, *distilling(folder, "alone", batch_size=8))))
    assert plain == pytest.approx(alone, rel=2e-3)
    torch.testing.assert_close(answer(folder / "plain"), answer(folder / "alone"), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("stage", STAGES)
def test_a_student_learns_as_without_deepspeed(python: Path, folder: Path, plain: list[float], stage: int) -> None:
    name = f"student-{stage}"
    said = run(command(python, 2, *distilling(folder, name, "--deepspeed", str(folder / f"zero{stage}.json"))))
    assert losses(said) == pytest.approx(plain, rel=2e-3)
    assert said.count("step 40 of 40") == 1  # the first process speaks
    torch.testing.assert_close(answer(folder / name), answer(folder / "plain"), atol=0.02, rtol=0.02)
    report = json.loads((folder / f"{name}-reports/distill.json").read_text())
    assert report["after"]["kl"] < 0.8 * report["before"]["kl"]


def test_it_goes_on_after_a_kill(python: Path, folder: Path, plain: list[float]) -> None:
    arguments = distilling(folder, "killed", "--deepspeed", str(folder / "zero3.json"), "--save-every", "5")
    words = command(python, 2, *arguments)
    with subprocess.Popen(words, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "step 20 of 40" in line:
                # The launcher's processes have sessions of their own and would go on without it.
                every = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
                for each in every:
                    each.kill()
                psutil.wait_procs(every, timeout=60)
                break
    assert not (folder / "killed").exists()
    shards = {path.name for path in (folder / "killed.training").rglob("*_optim_states.pt")}
    assert len(shards) == 2, shards  # each process has its part of the optimizer's state
    said = run(command(python, 2, *arguments))
    begun = re.search(r"goes on behind step (\d+)", said)
    assert begun is not None
    assert int(begun[1]) in range(10, 40)
    assert losses(said)[-1] == pytest.approx(plain[-1], rel=2e-3)
    torch.testing.assert_close(answer(folder / "killed"), answer(folder / "plain"), atol=0.02, rtol=0.02)


def test_one_process_needs_no_launcher(python: Path, folder: Path, plain: list[float]) -> None:
    configuration = str(ROOT / "examples/deepspeed/cpus.json")
    said = run(command(python, 0, *distilling(folder, "one", "--deepspeed", configuration, batch_size=8)))
    assert losses(said) == pytest.approx(plain, rel=2e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_a_head_is_trained(python: Path, folder: Path, stage: int) -> None:
    def training(name: str, *more: str) -> str:
        return run(command(
            python, 2, "train-head", "vectors", "--task", "text-classification", "--data",
            str(folder / "classes.jsonl"), "--output", str(folder / name), "--epochs", "20", "--learning-rate",
            "0.003", "--batch-size", "4", "--length", "32", "--models-file", str(folder / "models.toml"), *more,
        ))  # fmt: skip

    expected = losses(training(f"head-{stage}-plain"))
    said = training(f"head-{stage}", "--deepspeed", str(folder / f"zero{stage}.json"))
    assert losses(said) == pytest.approx(expected, rel=0.02, abs=2e-3)
    assert "accuracy 1.000" in said
    model = AutoModelForSequenceClassification.from_pretrained(folder / f"head-{stage}")
    assert model.config.id2label == {0: "child", 1: "king", 2: "queen"}


READ = """
import sys
from deepspeed.runtime.config import DeepSpeedConfig
from trident_export.training import run

SIZES = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
for file in sys.argv[1:]:
    found = run.deepspeed_configuration(file)
    found |= {name: size for name, size in SIZES.items() if found[name] == "auto"}
    zero = {name: value for name, value in found["zero_optimization"].items() if value != "auto"}
    read = DeepSpeedConfig({**found, "zero_optimization": zero}).zero_config
    offload = read.offload_optimizer.device if read.offload_optimizer else None
    print("read:", int(read.stage), offload, read.gather_16bit_weights_on_model_save)
"""


def test_deepspeed_reads_the_examples(python: Path) -> None:
    files = sorted(map(str, (ROOT / "examples" / "deepspeed").glob("*.json")))
    done = subprocess.run([str(python), "-c", READ, *files], capture_output=True, text=True, check=True, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.startswith("read: ")]
    assert lines == ["read: 1 None False", "read: 3 None True", "read: 2 cpu False"]


def test_what_it_does_not_understand_is_said(python: Path, folder: Path) -> None:
    (folder / "wrong.json").write_text('{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 3}')
    words = command(python, 0, *distilling(folder, "wrong", "--deepspeed", str(folder / "wrong.json")))
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "DeepSpeed's configuration can't be used: " in done.stderr


def test_its_inference_engine_is_measured_beside_our_graphs(python: Path, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    sizes = ["--device", "cpu", "--shapes", "tiny", "--bits", "16", "--streams", "1", "2", "--prompts", "16"]
    run([str(python), str(ROOT / "benchmarks/gpu.py"), *sizes, "--out", str(out)])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["failed"] == {}
    assert found["parts"]["tiny, DeepSpeed"]["kernels"] is False  # a processor has none
    for count in (1, 2):
        step = found["parts"][f"tiny, DeepSpeed, {count} streams"]
        assert step["tokens_s"] == pytest.approx(1e3 * count / step["step_ms"])
