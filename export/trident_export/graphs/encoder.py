"""Export of an encoder through optimum, with one contract for every architecture.

The graph that is left has the inputs `input_ids` and `attention_mask`, and for tasks that read pairs of texts
`token_type_ids`, int64 [batch, sequence] each, whether or not the architecture has token types; where a task reads
single texts, models with token types get zeros for them inside the graph. Its outputs, all float32 but for `top_ids`:

    feature-extraction                     pooled [batch, hidden], one vector a text, not normalized
    text-classification, text-ranking,
    zero-shot-classification               logits [batch, labels]
    token-classification                   logits [batch, sequence, labels]
    question-answering                     start_logits, end_logits [batch, sequence]
    fill-mask                              top_scores, top_ids [batch, sequence, k], log_normalizer [batch, sequence]:
                                           the k largest logits, and the logarithm of the sum of all their powers
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from trident_export.errors import UnsupportedArchitecture
from trident_export.graphs.editing import constant, make, reduced, save
from trident_export.graphs.unpadding import unpad
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_serving.encoders.pooling import Pooling

TOKEN_TYPES = "token_type_ids"


def export_encoder_graph(
    source: HuggingFaceFolder,
    path: Path,
    task: str,
    head: Any,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    finish: Callable[[ir.Model], None],
) -> None:
    """Write the graph of the Hugging Face folder `source` to `path`, in float32.

    Args:
        task: optimum's name.
        head: the Auto class of transformers for it.
        inputs: names that the graph must have, as above.
        outputs: so too.
        finish: adds the outputs that optimum's graph lacks.

    Raises:
        UnsupportedArchitecture: optimum does not know it, or gave a graph with other inputs or outputs.
        UnreadableSource: the weights are missing or damaged.
    """
    from optimum.exporters.onnx import main_export
    from optimum.exporters.tasks import TasksManager

    check_architecture(source, task, TasksManager)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with _read_by_others(source, head):
                # "transformers": optimum would otherwise export a sentence-transformers graph with the pooling inside.
                main_export(
                    str(source),
                    output=scratch,
                    task=task,
                    library_name="transformers",
                    do_validation=False,
                    no_post_process=True,
                    local_files_only=True,
                )
        model = ir.from_proto(onnx.load(str(Path(scratch) / "model.onnx")))
    if TOKEN_TYPES in inputs:
        with_token_types(model)
    else:
        without_token_types(model)
    finish(model)
    found = [value.name for value in model.graph.inputs]
    given = {value.name: value for value in model.graph.outputs}
    if sorted(found) != sorted(inputs) or not set(outputs) <= set(given):
        raise UnsupportedArchitecture(
            f"{source} gives a graph with the inputs {', '.join(found)} and the outputs {', '.join(given)}, and {task} "
            f"is served with {', '.join(inputs)} and {', '.join(outputs)}: choose a model for that task"
        )
    model.graph.outputs.clear()
    model.graph.outputs.extend(given[name] for name in outputs)
    unpad(model)
    save(model, path)


def check_architecture(source: HuggingFaceFolder, task: str, manager: Any) -> None:
    """Optimum must have a form for the folder's architecture.

    Args:
        manager: optimum's TasksManager.

    Raises:
        UnsupportedArchitecture: it has none.
    """
    kind = source.config.model_type
    known = manager._SUPPORTED_MODEL_TYPE
    if kind not in known or task not in manager.get_supported_tasks_for_model_type(
        kind, "onnx", library_name="transformers"
    ):
        raise UnsupportedArchitecture(
            f"{source} is a model of type {kind!r}, for which optimum has no ONNX form for {task}: choose another model"
        )


@contextlib.contextmanager
def _read_by_others(source: HuggingFaceFolder, head: Any) -> Iterator[None]:
    """Optimum reads the folder itself; where it fails, reading the folder once more tells whether that is why."""
    try:
        yield
    except Exception:
        source.load(head)
        raise


def without_token_types(model: ir.Model) -> None:
    """Replace the input `token_type_ids`, where there is one, by zeros of the shape of `input_ids`."""
    inputs = {value.name: value for value in model.graph.inputs}
    if TOKEN_TYPES in inputs:
        given, ids = inputs[TOKEN_TYPES], inputs["input_ids"]
        zeros = make("Sub", [ids, ids], TOKEN_TYPES, name="zero_token_types")
        given.replace_all_uses_with(zeros.outputs[0])
        model.graph.inputs.remove(given)
        model.graph.insert_before(model.graph[0], zeros)


def with_token_types(model: ir.Model) -> None:
    """Add the input `token_type_ids` where the architecture has none; nothing reads it then."""
    inputs = {value.name: value for value in model.graph.inputs}
    if TOKEN_TYPES not in inputs:
        ids = inputs["input_ids"]
        model.graph.inputs.append(ir.Value(name=TOKEN_TYPES, type=ids.type, shape=ids.shape))


def with_top_logits(model: ir.Model, k: int) -> None:
    """Add the outputs of fill-mask: a vocabulary of logits for every token is too much to hand from stage to stage."""
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    axes: list[int | str] = ["batch", "sequence"]
    scores = ir.val("top_scores", ir.DataType.FLOAT, [*axes, k])
    ids = ir.val("top_ids", ir.DataType.INT64, [*axes, k])
    count = constant(graph, "top_k", np.array([k], np.int64))
    top = ir.node("TopK", [logits, count], {"axis": -1}, outputs=[scores, ids], name="top_logits")
    last = constant(graph, "last_axis", np.array([-1], np.int64))
    inputs, axis = reduced(model, logits, last)
    normalizer = make("ReduceLogSumExp", inputs, "log_normalizer", keepdims=0, **axis)
    graph.extend([top, normalizer])
    normalizer.outputs[0].type, normalizer.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(axes)
    graph.outputs.extend([scores, ids, *normalizer.outputs])


def with_pooling(model: ir.Model, pooling: Pooling) -> None:
    """Add the output `pooled`; the numbers are those of `encoders.pooling.pool` for padding on the right."""
    graph = model.graph
    hidden = next(value for value in graph.outputs if value.name == "last_hidden_state")
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    zero, one, two, lowest = (
        constant(graph, f"pooling/{name}", value)
        for name, value in (
            ("zero", np.array(0, np.int64)),
            ("one", np.array([1], np.int64)),
            ("two", np.array([2], np.int64)),
            ("lowest", np.array(np.finfo(np.float32).min, np.float32)),
        )
    )

    def add(kind: str, inputs: list[ir.Value], output: str, **attributes: Any) -> ir.Value:
        graph.append(make(kind, inputs, output, **attributes))
        return graph[-1].outputs[0]

    if pooling is Pooling.CLS:
        pooled = add("Gather", [hidden, zero], "pooled", axis=1)
    elif pooling is Pooling.LAST_TOKEN:
        lengths = add("ReduceSum", [mask, one], "pooling/lengths", keepdims=1)
        ends = add("Sub", [lengths, one], "pooling/ends")
        pooled = add("GatherND", [hidden, ends], "pooled", batch_dims=1)
    elif pooling is Pooling.MAX:
        column = add("Unsqueeze", [mask, two], "pooling/column")
        real = add("Cast", [column], "pooling/real", to=ir.DataType.BOOL)
        kept = add("Where", [real, hidden, lowest], "pooling/kept")
        inputs, axis = reduced(model, kept, one)
        pooled = add("ReduceMax", inputs, "pooled", keepdims=0, **axis)
    else:
        weights = add("Cast", [mask], "pooling/weights", to=ir.DataType.FLOAT)
        row = add("Unsqueeze", [weights, one], "pooling/row")
        summed = add("MatMul", [row, hidden], "pooling/sum")
        total = add("Squeeze", [summed, one], "pooling/total")
        count = add("ReduceSum", [weights, one], "pooling/count", keepdims=1)
        pooled = add("Div", [total, count], "pooled")
    pooled.type, pooled.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", hidden.shape[2]])
    graph.outputs.append(pooled)
