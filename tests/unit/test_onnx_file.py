"""Weights in ONNX files become what onnxruntime makes of them: its tools quantize, and it runs unit vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from transformers import AutoModelForTokenClassification, PreTrainedModel

from tests import tiny_models
from trident_export import models_file
from trident_export.errors import ExportError
from trident_export.huggingface import sources

LABELS = {index: f"L{index}" for index in range(5)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "bert"
    return tiny_models.make_reader(path, "bert", AutoModelForTokenClassification, id2label=LABELS)


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForTokenClassification.from_pretrained(folder).eval()


def matrices(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Linear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))


def graph_of(model: PreTrainedModel, renamed: Callable[[str], str] = str) -> onnx.ModelProto:
    """A graph with every weight of a model as an exporter stores it: matrices transposed and without their names.

    It computes nothing of the model: each matrix and table is read by itself, so that it can be asked for.
    """
    nodes, stored, inputs, outputs = [], [], [], []
    linear = {f"{name}.weight": name for name, _ in matrices(model)}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        values = parameter.detach().numpy()
        place = "/" + renamed(linear.get(name, name)).replace(".", "/")
        if name in linear:
            stored.append(numpy_helper.from_array(np.ascontiguousarray(values.T), f"onnx::MatMul_{number}"))
            inputs.append(
                helper.make_tensor_value_info(f"x{number}", TensorProto.FLOAT, [f"n{number}", values.shape[1]])
            )
            nodes.append(
                helper.make_node("MatMul", [f"x{number}", f"onnx::MatMul_{number}"], [f"y.{name}"], f"{place}/MatMul")
            )
        else:
            stored.append(numpy_helper.from_array(values, renamed(name)))
            inputs.append(helper.make_tensor_value_info(f"x{number}", TensorProto.INT64, [f"n{number}"]))
            nodes.append(helper.make_node("Gather", [renamed(name), f"x{number}"], [f"y.{name}"], f"{place}/Gather"))
        outputs.append(helper.make_tensor_value_info(f"y.{name}", TensorProto.FLOAT, None))
    graph = helper.make_graph(nodes, "weights", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def weights_by_onnxruntime(file: Path, model: PreTrainedModel) -> dict[str, NDArray[np.float32]]:
    """What the operators of a graph of `graph_of` make of each weight: rows, and answers to unit vectors."""
    session = ort.InferenceSession(file)
    linear = {f"{name}.weight" for name, _ in matrices(model)}
    feeds: dict[str, Any] = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        size = parameter.shape[1] if name in linear else parameter.shape[0]
        feeds[f"x{number}"] = np.eye(size, dtype=np.float32) if name in linear else np.arange(size)
    names = [output.name.removeprefix("y.") for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, feeds), strict=True))
    return {name: values.T if name in linear else values for name, values in found.items()}


def eight_bits(per_channel: bool) -> Callable[[Path], None]:
    def quantize(file: Path) -> None:
        quantize_dynamic(file, file, per_channel=per_channel, weight_type=QuantType.QInt8)

    return quantize


def blocks(bits: int, symmetric: bool) -> Callable[[Path], None]:
    def quantize(file: Path) -> None:
        config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=symmetric, bits=bits)
        made = MatMulNBitsQuantizer(onnx.load(file), algo_config=config)
        made.process()
        made.model.save_model_to_file(str(file))

    return quantize


FORMS: dict[str, Callable[[Path], None]] = {
    "numbers": lambda file: None,
    "int8": eight_bits(per_channel=False),
    "int4-blocks": blocks(4, symmetric=True),
    "int4-blocks-zero-points": blocks(4, symmetric=False),
    "int8-blocks": blocks(8, symmetric=False),
}


def packaged(folder: Path, target: Path, graph: onnx.ModelProto, quantize: Callable[[Path], None]) -> Path:
    """A package's folder: settings, a tokenizer that cuts texts, and a graph in its folder `onnx`."""
    (target / "onnx").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    cutting = {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
    table = json.loads((target / "tokenizer.json").read_text())
    (target / "tokenizer.json").write_text(json.dumps(table | {"truncation": cutting}))
    onnx.save(graph, target / "onnx/model.onnx")
    quantize(target / "onnx/model.onnx")
    return target


def fetched(path: Path, cache: Path, files: str = "") -> Path:
    cache.mkdir(exist_ok=True)
    entry = (
        f'[tiny]\ntask = "token-classification"\nvariants = ["fp32"]\nlimits = {{ labels = 5 }}\n'
        f'[tiny.source]\npath = "{path}"\n{files}'
    )
    (cache / "models.toml").write_text(entry)
    (spec,) = models_file.load(cache / "models.toml")
    return sources.fetch(spec, cache, cache, lambda message: None).path


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_what_the_operators_make_of_them(
    folder: Path, model: PreTrainedModel, tmp_path: Path, form: str
) -> None:
    path = packaged(folder, tmp_path / "package", graph_of(model), FORMS[form])
    plain = fetched(path, tmp_path / "cache")
    found = AutoModelForTokenClassification.from_pretrained(plain)
    expected = weights_by_onnxruntime(path / "onnx/model.onnx", model)
    off = 0.0
    for name, parameter in found.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
        off = max(off, float((parameter - model.get_parameter(name)).detach().abs().max()))
    assert (off > 1e-3) == (form != "numbers")  # they are rounded
    assert found.config.id2label == LABELS
    assert json.loads((plain / "tokenizer.json").read_text())["truncation"] is None
    assert fetched(path, tmp_path / "cache") == plain  # made once


def test_names_of_a_wrapper_and_settings_that_are_missing(folder: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    path = packaged(folder, tmp_path / "package", graph_of(model, lambda name: f"m.{name}"), FORMS["numbers"])
    (path / "config.json").write_text("{}")
    settings = json.loads((folder / "config.json").read_text())
    wanted = {key: settings[key] for key in ("architectures", "model_type", "hidden_size", "intermediate_size")}
    wanted |= {key: settings[key] for key in ("num_hidden_layers", "num_attention_heads", "vocab_size")}
    wanted |= {"max_position_embeddings": 130, "pad_token_id": settings["pad_token_id"]}
    text = '[tiny.source.files."config.json"]\n' + "".join(
        f"{key} = {json.dumps(value)}\n" for key, value in wanted.items()
    )
    labels = "id2label = { " + ", ".join(f'{index} = "{name}"' for index, name in LABELS.items()) + " }\n"
    plain = fetched(path, tmp_path / "cache", text + labels)
    found = AutoModelForTokenClassification.from_pretrained(plain)
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_what_does_not_fit_is_refused(folder: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    def refusal(change: Callable[[Path], None], graph: onnx.ModelProto) -> str:
        path = packaged(folder, tmp_path / str(len(list(tmp_path.iterdir()))), graph, FORMS["numbers"])
        change(path)
        with pytest.raises(ExportError) as error:
            fetched(path, tmp_path / "cache")
        return str(error.value)

    def setting(**values: object) -> Callable[[Path], None]:
        def change(path: Path) -> None:
            found = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps(found | values))

        return change

    graph = graph_of(model)
    assert "has the shape (48, 32), and config.json asks for (64, 32)" in refusal(
        setting(intermediate_size=64), graph_of(model)
    )
    assert "has the tensor bert.encoder.layer.1." in refusal(setting(num_hidden_layers=1), graph)
    assert "have no bert.encoder.layer.2.attention.self.query.weight" in refusal(setting(num_hidden_layers=3), graph)
    assert "architectures 'none', which must be a class of transformers" in refusal(setting(architectures=None), graph)

    assert "and no config.json: copy the file" in refusal(lambda path: (path / "config.json").unlink(), graph)

    def cut(path: Path) -> None:
        file = path / "onnx/model.onnx"
        file.write_bytes(file.read_bytes()[:5000])

    assert "model.onnx can't be read" in refusal(cut, graph)

    def second(path: Path) -> None:
        other = onnx.load(path / "onnx/model.onnx")
        first = other.graph.initializer[0]
        first.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(first) + 1, first.name))
        onnx.save(other, path / "onnx/model_other.onnx")

    assert "with other numbers than model.onnx, model_other.onnx before it: name one" in refusal(second, graph)


def test_files_are_for_weights_in_onnx_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="files are for weights in ONNX files"):
        fetched(folder, tmp_path, '[tiny.source.files."config.json"]\nhidden_size = 3\n')


@pytest.mark.parametrize("scales", [5, 32])
def test_scales_of_rows_are_refused(folder: Path, model: PreTrainedModel, tmp_path: Path, scales: int) -> None:
    def rows(file: Path) -> None:
        graph = onnx.load(file)
        stored = {tensor.name: tensor for tensor in graph.graph.initializer}
        scale = stored["bert.embeddings.word_embeddings.weight_scale"]
        scale.CopyFrom(numpy_helper.from_array(np.ones(scales, np.float32), scale.name))
        onnx.save(graph, file)

    def both(file: Path) -> None:
        FORMS["int8"](file)
        rows(file)

    path = packaged(folder, tmp_path / "package", graph_of(model), both)
    with pytest.raises(ExportError, match=rf"word_embeddings.weight with {scales} scales, which are read for"):
        fetched(path, tmp_path / "cache")
