"""The graph passes on small graphs, against the unchanged graph in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from trident_export.graphs import shape_folding


class Reshaping(torch.nn.Module):
    """What attention layers do: split heads by the sizes of the input, halve the last dimension, merge."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (x + 1).view(x.shape[0], x.shape[1], -1, 4).transpose(1, 2)
        half = heads.shape[-1] // 2
        turned = torch.cat([-heads[..., half:], heads[..., :half]], dim=-1)
        return turned.transpose(1, 2).reshape(x.shape[0], x.shape[1], 12)


class Flattening(torch.nn.Module):
    """What gpt2's layers do: two dimensions in between, so a 0 would keep the wrong ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.view(-1, 12) * 2).view(x.shape[0], x.shape[1], 12)


class Swapped(torch.nn.Module):
    """Batch and sequence change places: nothing is kept."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1).reshape(x.shape[1], x.shape[0], 4, 3)


def exported(module: torch.nn.Module, path: Any) -> onnx.ModelProto:
    axes = {"x": {0: "batch", 1: "sequence"}, "y": {0: "batch", 1: "sequence"}}
    with torch.inference_mode():
        torch.onnx.export(
            module,
            (torch.zeros(2, 3, 12),),
            str(path),
            input_names=["x"],
            output_names=["y"],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
            do_constant_folding=True,
        )
    return onnx.load(str(path))


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("module", "changed"), [(Reshaping(), True), (Flattening(), False), (Swapped(), False)])
def test_answers_are_the_same_for_every_shape(module: torch.nn.Module, changed: bool, tmp_path: Any) -> None:
    model = exported(module, tmp_path / "model.onnx")
    changed_model = ir.from_proto(model)
    count = shape_folding.fold_shapes(changed_model)
    folded = ir.to_proto(changed_model)
    shapes = [node for node in folded.graph.node if node.op_type == "Shape"]
    if changed:
        assert count >= 3
        assert shapes == []
    else:
        assert shape_folding.fold_reshapes(ir.load(tmp_path / "model.onnx")) == 0
        assert shapes != []
    onnx.checker.check_model(folded)
    random = np.random.default_rng(0)
    for batch, sequence in ((2, 3), (1, 1), (3, 2), (5, 7), (1, 4)):
        x = random.standard_normal((batch, sequence, 12)).astype(np.float32)
        expected = module(torch.tensor(x)).numpy()
        np.testing.assert_array_equal(run(folded, x), expected)
        np.testing.assert_array_equal(run(model, x), expected)
