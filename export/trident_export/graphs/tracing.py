"""One call of torch's exporter for every graph, and what its failures mean.

The exporter is the one that records a run (`dynamo=False`): see decision 0036 for what it is chosen over and why. It
writes the graph alone: what it would serialize as weights, views of the model's own numbers, is handed on as it is, so
that no weight is held twice, and each is read when the graph is saved.
"""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch.onnx import errors as onnx_errors
from torch.onnx._internal.torchscript_exporter import symbolic_opset9, symbolic_opset13
from torch.onnx._internal.torchscript_exporter import utils as exporter
from torch.onnx.utils import register_custom_op_symbolic

from trident_export.errors import ExportError, UnsupportedArchitecture
from trident_export.huggingface.folder import reason

logger = logging.getLogger(__name__)

OPSET = 17


def _expm1(g, value):  # type: ignore[no-untyped-def]
    return g.op("Sub", g.op("Exp", value), g.op("Constant", value_t=torch.ones(())))


def _rms_norm(g, value, shape, weight, eps):  # type: ignore[no-untyped-def]
    number = eps.node().t("value").item() if eps.node().kind() == "onnx::Constant" else torch.finfo(torch.float32).eps
    mean = g.op(
        "ReduceMean", g.op("Pow", value, g.op("Constant", value_t=torch.tensor(2.0))), axes_i=[-1], keepdims_i=1
    )
    root = g.op("Sqrt", g.op("Add", mean, g.op("Constant", value_t=torch.tensor(float(number)))))
    normed = g.op("Div", value, root)
    return normed if weight.node().mustBeNone() else g.op("Mul", normed, weight)


def _repeat_interleave(g, value, repeats, dim=None, output_size=None):  # type: ignore[no-untyped-def]
    """Of a last dimension; torch's exporter writes a loop, and a rank that is not the result's."""
    sizes, count, axis = value.type().sizes(), _number(repeats), _number(dim)  # type: ignore[no-untyped-call]
    last = (-1, 3) if sizes is None else (-1, len(sizes) - 1)  # heads have four dimensions
    if count is None or axis not in last:
        return symbolic_opset13.repeat_interleave(g, value, repeats, dim, output_size)

    def constant(*numbers: int):  # type: ignore[no-untyped-def]
        return g.op("Constant", value_t=torch.tensor(numbers))

    copies = g.op("Concat", *[g.op("Unsqueeze", value, constant(-1))] * count, axis_i=-1)
    kept = g.op("Slice", g.op("Shape", value), constant(0), constant(-1))
    return g.op("Reshape", copies, g.op("Concat", kept, constant(-1), axis_i=0))


def _index_add(g, value, dim, index, source, alpha=None):  # type: ignore[no-untyped-def]
    """Along the first dimension of a matrix; torch's exporter loses all but one of several with the same index."""
    if _number(dim) != 0 or len(value.type().sizes() or (0, 0)) != 2:  # type: ignore[no-untyped-call]
        return symbolic_opset9.index_add(g, value, dim, index, source, alpha)
    column = g.op("Unsqueeze", index, g.op("Constant", value_t=torch.tensor([1])))
    places = g.op("Expand", column, g.op("Shape", source))
    return g.op("ScatterElements", value, places, source, axis_i=0, reduction_s="add").setType(value.type())


def _number(value):  # type: ignore[no-untyped-def]
    if value is None or value.node().kind() != "onnx::Constant" or "value" not in value.node().attributeNames():
        return None
    tensor = value.node().t("value")
    return int(tensor) if tensor.ndim == 0 else None


# Which torch's exporter lacks; norms are over the last dimension in transformers.
register_custom_op_symbolic("aten::expm1", _expm1, OPSET)
register_custom_op_symbolic("aten::rms_norm", _rms_norm, OPSET)
register_custom_op_symbolic("aten::index_add", _index_add, OPSET)
register_custom_op_symbolic("aten::repeat_interleave", _repeat_interleave, OPSET)


def trace(
    module: torch.nn.Module,
    arguments: Sequence[torch.Tensor],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
    of: str,
    operators: bool = True,
) -> ir.Model:
    """The graph of one run of `module`, whose numbers are the module's own: it must not change until they are saved.

    Args:
        arguments: the run's inputs, in the order of `inputs`.
        axes: names of the sizes that may differ from run to run, by input or output and dimension.
        of: what is traced, as errors name it.
        operators: whether the graph has ONNX Runtime's own operators.

    Raises:
        UnsupportedArchitecture: the model can't be run like this, or does what ONNX can't express.
    """
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        with running(of), torch.inference_mode(), warnings.catch_warnings(), _weights_kept() as weights:
            warnings.simplefilter("ignore")  # about constants: shapes are checked by the gate
            torch.onnx.export(
                module.eval(),  # the exporter restores this mode on the model
                tuple(arguments),
                file.name,
                export_params=False,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes={name: dict(sizes) for name, sizes in axes.items()},
                opset_version=OPSET,
                dynamo=False,
                custom_opsets={"com.microsoft": 1} if operators else None,
            )
        model = ir.load(file.name)
    for value in [value for value in model.graph.inputs if value.name in weights]:
        model.graph.inputs.remove(value)
        value.const_value = TorchTensor(weights[value.name], name=value.name)
        model.graph.register_initializer(value)
    return model


@contextmanager
def _weights_kept() -> Iterator[dict[str, torch.Tensor]]:
    """While this holds, the exporter tells what its graph calls the model's weights, and those that it folded.

    Its shape inference sees no matrices of floats: no shape depends on one, and it would copy each that is transposed.
    """
    weights: dict[str, torch.Tensor] = {}
    convert, infer = exporter._model_to_graph, torch._C._jit_pass_onnx_graph_shape_type_inference

    def recorded(*arguments: object, **options: object) -> object:
        made = convert(*arguments, **options)
        weights.update(made[1])
        return made

    def inferred(graph: torch.Graph, parameters: Mapping[str, Any], opset: int) -> None:
        infer(graph, {name: t for name, t in parameters.items() if t.ndim < 2 or not t.is_floating_point()}, opset)

    with (
        mock.patch.object(exporter, "_model_to_graph", recorded),
        mock.patch.object(torch._C, "_jit_pass_onnx_graph_shape_type_inference", inferred),
    ):
        yield weights


@contextmanager
def running(of: str, doing: str = "be traced to a graph") -> Iterator[None]:
    """Translate what a model's own code raises. What it says is logged, which `--verbose` shows.

    Args:
        of: what is run, as the error names it.
        doing: what it then can't do.

    Raises:
        UnsupportedArchitecture: something was raised that is no ExportError, and not for want of memory or disk.
    """
    try:
        yield
    except (ExportError, MemoryError, OSError):
        raise
    except Exception as error:  # a model's own code can raise anything
        raise UnsupportedArchitecture(f"{of} can't {doing}: {cause(error)}: choose another model") from error


def cause(error: Exception) -> str:
    """Why a model's own code failed, in a user's words; what it said itself is logged."""
    if isinstance(error, ExportError):
        return str(error)
    logger.warning("%s", reason(error))
    if isinstance(error, onnx_errors.UnsupportedOperatorError) and (found := re.search("'([^']+)'", str(error))):
        return f"it computes {found.group(1)}, which ONNX has no operator for"
    return "its code does there what Trident does not know (--verbose shows its library's words)"
