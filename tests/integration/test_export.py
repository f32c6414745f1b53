"""Exports into a repository: what is made again and what is not, and what an interruption leaves."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny_models
from tests.conftest import ROOT, run_export, run_export_cold
from trident_export import fingerprint, install, models_file, recipes, tasks
from trident_export.errors import FidelityError
from trident_export.graphs import decoder_passes, editing
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.measure import fidelity
from trident_export.tasks import text_generation
from trident_serving import artefacts
from trident_serving.generation import decoder


def write_models_file(root: Path, entries: dict[str, str]) -> Path:
    path = root / "models.toml"
    path.write_text(tiny_models.models_toml(entries))
    return path


def export(path: Path, repository: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return run_export("export", *more, "--models-file", str(path), "--repository", str(repository))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny_models.make_causal(root / name, name) for name in ("gpt2", "llama")}


def manifest_times(repository: Path) -> dict[str, int]:
    return {path.parts[-3]: path.stat().st_mtime_ns for path in repository.glob("*/1/trident.json")}


def test_only_what_changed_is_exported_again(tiny: dict[str, Path], tmp_path: Path) -> None:
    entries = {name: tiny_models.causal_entry(folder) for name, folder in tiny.items()}
    path, repository = write_models_file(tmp_path, entries), tmp_path / "repository"
    assert export(path, repository).returncode == 0
    first = manifest_times(repository)
    assert set(first) == {"gpt2", "llama"}

    again = export(path, repository)
    assert (again.returncode, again.stderr) == (0, "")
    assert manifest_times(repository) == first

    write_models_file(tmp_path, entries | {"gpt2": tiny_models.causal_entry(tiny["gpt2"], slots=3)})
    assert export(path, repository).returncode == 0
    second = manifest_times(repository)
    assert second["gpt2"] > first["gpt2"]
    assert second["llama"] == first["llama"]
    assert '"3"' in (repository / "gpt2/config.pbtxt").read_text()

    (tiny["llama"] / "generation_config.json").touch()
    assert export(path, repository).returncode == 0
    third = manifest_times(repository)
    assert third["llama"] > second["llama"]
    assert third["gpt2"] == second["gpt2"]


def test_the_exporters_own_version_counts(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = models_file.parse("gpt2", _table(tiny["gpt2"]))
    before = fingerprint.fingerprint(spec, tmp_path)
    assert fingerprint.fingerprint(spec, tmp_path) == before
    monkeypatch.setattr(fingerprint, "code", lambda module: f"another {module}")
    assert fingerprint.fingerprint(spec, tmp_path) != before


def _table(folder: Path) -> dict[str, object]:
    import tomllib

    return tomllib.loads(tiny_models.causal_entry(folder))


def test_a_killed_export_leaves_no_half_model(tiny: dict[str, Path], tmp_path: Path) -> None:
    path = write_models_file(tmp_path, {"llama": tiny_models.causal_entry(tiny["llama"])})
    repository = tmp_path / "repository"
    command = [sys.executable, "-m", "trident_export", "export"]
    command += ["--models-file", str(path), "--repository", str(repository)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "comparing" in line:
                process.send_signal(signal.SIGKILL)
                break
    assert artefacts.loadable(repository) == []
    assert list((repository / ".trident").glob("staging-*"))
    assert export(path, repository).returncode == 0
    assert artefacts.loadable(repository) == ["llama"]
    assert not list((repository / ".trident").glob("staging-*"))


def test_two_exports_at_once(tiny: dict[str, Path], tmp_path: Path) -> None:
    path = write_models_file(tmp_path, {"llama": tiny_models.causal_entry(tiny["llama"])})
    repository = tmp_path / "repository"
    command = [sys.executable, "-m", "trident_export", "export"]
    command += ["--models-file", str(path), "--repository", str(repository)]
    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    logs = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("tracing the graph" in log for log in logs) == 1
    assert artefacts.loadable(repository) == ["llama"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('source = { path = "nowhere" }', "nowhere does not exist"),
        ('source = { package = "no-such-package-for-trident==1.0", path = "x" }', "can't be installed"),
        ('source = { path = "." }', "no Hugging Face folder"),
    ],
)
def test_a_source_that_can_not_be_had(tmp_path: Path, entry: str, message: str) -> None:
    body = f'task = "text-generation"\n{entry}\nvariants = ["fp32"]\nlimits = {{ }}\n'
    done = export(write_models_file(tmp_path, {"gone": body}), tmp_path / "repository")
    assert done.returncode == 1
    assert message in done.stderr
    assert artefacts.loadable(tmp_path / "repository") == []


def test_a_hub_that_can_not_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    done = run_export_cold("export", "gpt2", "--repository", str(tmp_path / "repository"))
    assert done.returncode == 1
    assert "the Hugging Face hub did not give openai-community/gpt2" in done.stderr
    assert "source = { path = ... }" in done.stderr


@pytest.mark.slow
def test_nothing_is_pinned_where_the_hub_can_not_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    done = run_export_cold("pin", "--models-file", str(ROOT / "models.toml"))
    assert done.returncode == 1
    assert "the Hugging Face hub did not give" in done.stderr


def test_no_room_on_the_disk(tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    from trident_export import disk

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: usage(0, 0, 10 * 2**20))
    spec = models_file.parse("llama", _table(tiny["llama"]))
    with pytest.raises(disk.NoSpace, match=r"the export needs \d+ MiB .* and 10 MiB are free"):
        install.export([spec], tmp_path / "repository", tmp_path, tmp_path, lambda message: None)
    assert artefacts.loadable(tmp_path / "repository") == []


def test_limits_that_the_model_does_not_have(tiny: dict[str, Path], tmp_path: Path) -> None:
    path = write_models_file(tmp_path, {"llama": tiny_models.causal_entry(tiny["llama"], context=4096)})
    done = export(path, tmp_path / "repository")
    assert done.returncode == 1
    assert "limits.context is 4096, the model was built for 128 positions" in done.stderr


def test_a_tokenizer_of_another_model(tiny: dict[str, Path], smollm2_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny["llama"], tmp_path / "mixed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(smollm2_folder / name, tmp_path / "mixed" / name)
    done = export(
        write_models_file(tmp_path, {"mixed": tiny_models.causal_entry(tmp_path / "mixed")}), tmp_path / "repository"
    )
    assert done.returncode == 1
    assert "the model has 512: it is another model's" in done.stderr


# Damage: what an exporter, a quantizer or a disk might do to a model. Each must be refused.


def _zero_a_layer(model: torch.nn.Module) -> None:
    model.model.layers[1].mlp.down_proj.weight.data.zero_()


def _swap_two_heads(model: torch.nn.Module) -> None:
    weight = model.model.layers[0].self_attn.q_proj.weight.data
    weight[:32] = torch.cat([weight[16:32], weight[:16]])


def _scale_by_three_percent(model: torch.nn.Module) -> None:
    model.model.layers[0].self_attn.o_proj.weight.data.mul_(1.03)


@pytest.mark.parametrize("damage", [_zero_a_layer, _swap_two_heads, _scale_by_three_percent])
def test_a_damaged_generator_is_refused(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: object
) -> None:
    """Damaged between the reference run and the tracing."""
    original = text_generation.export_causal_graph

    def damaged(model: torch.nn.Module, *more: Any, **adapted: bool) -> ir.Model:
        damage(model)  # type: ignore[operator]
        return original(model, *more, **adapted)

    monkeypatch.setattr(text_generation, "export_causal_graph", damaged)
    spec = models_file.parse("llama", _table(tiny["llama"]))
    with pytest.raises(FidelityError, match=r"fp32 does not compute what Hugging Face computes: kl is"):
        install.export([spec], tmp_path / "repository", tmp_path, tmp_path, lambda message: None)
    assert artefacts.loadable(tmp_path / "repository") == []
    assert not list((tmp_path / "repository/.trident").glob("staging-*"))


def test_wrong_positions_are_refused(tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is right in prefill and wrong in decode: the gate runs both."""
    from trident_serving.generation.decoder import OnnxDecoder

    original = OnnxDecoder.run

    def shifted(self, items):  # type: ignore[no-untyped-def]
        late = [item.start > 0 and len(item.tokens) == 1 for item in items]
        return original(self, [replace(item, start=item.start - one) for item, one in zip(items, late, strict=True)])

    monkeypatch.setattr(OnnxDecoder, "run", shifted)
    spec = models_file.parse("llama", _table(tiny["llama"]))
    with pytest.raises(FidelityError, match="kl is"):
        tasks.build(
            tasks.Job(spec, HuggingFaceFolder(tiny["llama"]), _made(tmp_path / "staging"), lambda message: None)
        )


def test_answers_that_depend_on_the_batch_are_refused(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With only one position for a single token, the operator sums in another order than for several."""
    monkeypatch.setattr(decoder, "MIN_POSITIONS", 1)
    spec = models_file.parse("llama", _table(tiny["llama"]))
    with pytest.raises(FidelityError, match="computes: batch_effect is .*, must be at most 0"):
        tasks.build(
            tasks.Job(spec, HuggingFaceFolder(tiny["llama"]), _made(tmp_path / "staging"), lambda message: None)
        )


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_damaged_encoder_and_wrong_pooling_are_refused(
    minilm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trident_export.graphs import encoder as encoder_graph
    from trident_serving.encoders.pooling import Pooling

    table = {
        "task": "feature-extraction",
        "source": {"path": str(minilm_folder)},
        "variants": ["fp32"],
        "limits": {"dimensions": 384},
    }
    spec = models_file.parse("minilm", table)
    original = recipes.apply

    def damaged(recipe: Any, kind: Any, graph: Path, *more: Any) -> None:
        import numpy as np
        import onnx
        from onnx import numpy_helper

        model = onnx.load(str(graph))
        tensor = max(model.graph.initializer, key=lambda t: int(np.prod(t.dims)) if "MatMul" in t.name else 0)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.03), tensor.name))
        onnx.save(model, str(graph))
        original(recipe, kind, graph, *more)

    with monkeypatch.context() as patch:
        patch.setattr(recipes, "apply", damaged)
        with pytest.raises(FidelityError, match="worst_cosine|max_difference"):
            install.export([spec], tmp_path / "one", tmp_path, tmp_path, lambda message: None)

    original_pooling = encoder_graph.with_pooling
    monkeypatch.setattr(encoder_graph, "with_pooling", lambda model, pooling: original_pooling(model, Pooling.CLS))
    with pytest.raises(FidelityError, match="worst_cosine"):
        install.export([spec], tmp_path / "two", tmp_path, tmp_path, lambda message: None)
    assert artefacts.loadable(tmp_path / "one") == artefacts.loadable(tmp_path / "two") == []


def test_a_refused_export_keeps_the_model_that_was_there(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = models_file.parse("llama", _table(tiny["llama"]))
    repository = tmp_path / "repository"
    install.export([spec], repository, tmp_path, tmp_path, lambda message: None)
    files = ("llama/1/model.onnx", "llama/config.pbtxt")
    before = [(repository / file).read_bytes() for file in files]
    spec = models_file.parse("llama", _table(tiny["llama"]) | {"limits": {"context": 64}})
    monkeypatch.setattr(fingerprint, "code", lambda module: f"newer {module}")
    monkeypatch.setattr(fidelity, "compare_logits", lambda *_: {"kl": float("nan"), "top1": 1.0})
    with pytest.raises(FidelityError, match="kl is nan"):
        install.export([spec], repository, tmp_path, tmp_path, lambda message: None)
    assert [(repository / file).read_bytes() for file in files] == before
    assert artefacts.loadable(repository) == ["llama"]


def test_what_was_measured_is_in_the_manifest(default_repository: Path) -> None:
    manifest = json.loads((default_repository / "smollm2/1/trident.json").read_text())
    assert manifest["fidelity"]["fp32"]["kl"] < 1e-6
    assert 0 < manifest["fidelity"]["int8"]["kl"] < 0.02
    assert manifest["fidelity"]["int8"]["top1"] > 0.93
    assert manifest["fidelity"]["int8"]["tokens"] > 500


def test_int4_recipe_runs_and_the_gate_knows_it(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Gemm layers (gpt2) are quantized too, not left float32 in silence."""
    import onnx

    model = AutoModelForCausalLM.from_pretrained(tiny["gpt2"]).eval()
    graph = tmp_path / "graph.onnx"
    editing.save(decoder_passes.optimize(text_generation.export_causal_graph(model, 128)), graph)
    inputs = text_generation.inputs_of(onnx.load(str(graph), load_external_data=False).graph, [1, 2, 3])
    for variant in ("int8", "int4"):
        target = tmp_path / variant / "model.onnx"
        recipes.apply(recipes.load()[variant], recipes.Kind.DECODER, graph, target, lambda *_: iter([inputs]))
        nodes = onnx.load(str(tmp_path / variant / "model.onnx"), load_external_data=False).graph.node
        bits = [a.i for node in nodes if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "bits"]
        # Four matmuls in each of two layers, and the head, which stays at eight.
        assert sorted(bits) == ([4] * 8 + [8] if variant == "int4" else [8] * 9)
        assert not [node for node in nodes if node.op_type == "Gemm"]
