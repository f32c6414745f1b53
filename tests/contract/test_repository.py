"""models.toml, the committed configs and the exported graphs say the same."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from tests.conftest import ROOT, run_export, run_export_cold
from trident_export import configs, models_file
from trident_serving.encoders import TASKS
from trident_serving.triton.onnx_session import TensorInfo

REPOSITORY = ROOT / "model_repository"
SPECS = models_file.load(ROOT / "models.toml")
CONFIGS = {name: config for spec in SPECS for name, config in configs.build(spec).items()}
ENSEMBLES = [name for name, config in CONFIGS.items() if config.platform == "ensemble"]


def test_the_committed_configs_are_in_step() -> None:
    assert configs.drift([models_file.as_installed(spec, REPOSITORY) for spec in SPECS], REPOSITORY) == []


def test_drift_is_seen(tmp_path: Path) -> None:
    for spec in SPECS:
        if not spec.on_demand:
            configs.write(spec, tmp_path)
    assert configs.drift(SPECS, tmp_path) == []
    configs.write(next(spec for spec in SPECS if spec.name == "gpt2"), tmp_path)
    changed = tmp_path / "smollm2/config.pbtxt"
    changed.write_text(changed.read_text().replace("2048", "4096"))
    (tmp_path / "minilm/config.pbtxt").unlink()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.pbtxt").write_text('backend: "onnxruntime"\n')
    problems = configs.drift([spec for spec in SPECS if spec.name != "gpt2"], tmp_path)
    assert len(problems) == 4
    for part in ("smollm2/config.pbtxt differs", "minilm/config.pbtxt is missing", "gpt2/config.pbtxt belongs to no"):
        assert any(part in problem for problem in problems)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_survive_a_round_trip(name: str) -> None:
    assert text_format.Parse(configs.to_text(CONFIGS[name]), pb.ModelConfig()) == CONFIGS[name]


def test_a_config_is_committed_for_what_a_first_start_serves() -> None:
    committed = {name for spec in SPECS if not spec.on_demand for name in configs.build(spec)}
    assert committed <= {path.parent.name for path in REPOSITORY.glob("*/config.pbtxt")}
    assert len(committed) == 14


def _shape(config: pb.ModelConfig, tensor: pb.ModelInput) -> tuple[int, ...]:
    """With the batch: an ensemble that does not batch can hold a model that does."""
    return (*((-1,) if config.max_batch_size else ()), *(tensor.reshape.shape or tensor.dims))


@pytest.mark.parametrize("name", ENSEMBLES)
def test_every_ensemble_tensor_has_a_producer_of_the_same_type(name: str) -> None:
    ensemble = CONFIGS[name]
    made = {tensor.name: (tensor.data_type, _shape(ensemble, tensor)) for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        part = CONFIGS[step.model_name]
        assert not ensemble.max_batch_size or part.max_batch_size == ensemble.max_batch_size
        inputs = {tensor.name: tensor for tensor in part.input}
        assert {name for name, tensor in inputs.items() if not tensor.optional} <= set(step.input_map) <= set(inputs)
        assert ensemble.name.endswith("_texts") or set(step.input_map) == set(inputs)
        for inner, outer in step.input_map.items():
            assert made[outer] == (inputs[inner].data_type, _shape(part, inputs[inner]))
        outputs = {tensor.name: tensor for tensor in part.output}
        for inner, outer in step.output_map.items():
            made[outer] = (outputs[inner].data_type, _shape(part, outputs[inner]))
    for tensor in ensemble.output:
        assert made[tensor.name] == (tensor.data_type, _shape(ensemble, tensor))


@pytest.mark.parametrize("name", ["minilm_model", "minilm_model_int8"])
def test_graphs_equal_their_configs(default_repository: Path, name: str) -> None:
    session = ort.InferenceSession(str(default_repository / name / "1/model.onnx"))
    config = CONFIGS[name]
    for tensors, nodes in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        expected = {
            TensorInfo(tensor.name, pb.DataType.Name(tensor.data_type), (-1, *tensor.dims)) for tensor in tensors
        }
        assert {TensorInfo.of(node) for node in nodes} == expected


@pytest.mark.parametrize("name", ["smollm2", "smollm2_fp32"])
def test_decoder_graphs_have_the_engines_inputs(default_repository: Path, name: str) -> None:
    session = ort.InferenceSession(str(default_repository / name / "1/model.onnx"))
    inputs = {node.name: node for node in session.get_inputs()}
    past = [input_name for input_name in inputs if input_name.startswith("past_key_values.")]
    assert set(inputs) - set(past) == {  # no position_ids: the attention operator rotates by itself
        "input_ids",
        "attention_tokens",
        "attention_places",
        "query_seqlens",
        "seqlens_k",
        "total_sequence_length",
        "logits_tokens",
    }
    assert len(past) == 60
    outputs = {node.name: node for node in session.get_outputs()}
    for input_name in past:
        present = outputs[input_name.replace("past_key_values", "present")]
        assert present.shape[1] == inputs[input_name].shape[1] == 3
        assert present.shape[3] == inputs[input_name].shape[3] == 64


def test_the_command_finds_drift(tmp_path: Path) -> None:
    assert run_export_cold("configs", "--check").returncode == 0
    done = run_export("configs", "--check", "--repository", str(tmp_path))
    assert done.returncode == 1
    assert "smollm2/config.pbtxt is missing: run trident-export configs" in done.stderr
    done = run_export("configs", "--models-file", str(tmp_path / "none.toml"))
    assert (done.returncode, done.stderr) == (
        1,
        f"trident-export: there is no models file {tmp_path / 'none.toml'}\n",
    )


def test_no_stage_that_reads_texts_is_batched() -> None:
    """Triton fails all requests of a batch for one with malformed BYTES, options of a later stage among them."""
    limits: dict[str, dict[str, object]] = {
        "feature-extraction": {"dimensions": 8},
        "hybrid-embedding": {"dimensions": 8},
        "sparse-embedding": {"dimensions": 8},
        "token-classification": {"labels": 4},
        "image-classification": {"labels": 4},
        "image-feature-extraction": {"dimensions": 8},
        "zero-shot-image-classification": {"dimensions": 8},
    }
    limits |= {key: {"labels": 2} for key in ("text-classification", "text-ranking")}
    batched = {}
    for task in TASKS:
        table = {"task": task, "source": {"path": "x"}, "variants": ["fp32"], "limits": limits.get(task, {})}
        for name, config in configs.build(models_file.parse("x", table)).items():
            batched[task, name] = config.HasField("dynamic_batching")
            if any(tensor.data_type == pb.TYPE_STRING for tensor in config.input):
                assert not batched[task, name], (task, name)
    assert batched["token-classification", "x_model"]
    assert not batched["token-classification", "x_postprocess"]  # aggregation_strategy is a text
    assert batched["feature-extraction", "x_postprocess"]
    assert all(batched["zero-shot-image-classification", f"x_model-{tower}"] for tower in ("image", "text"))
