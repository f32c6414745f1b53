"""Export of an encoder through optimum, with one contract for every architecture.

The graph that is left has the inputs `input_ids` and `attention_mask`, and for tasks that read pairs of texts
`token_type_ids`, int64 [batch, sequence] each, whether or not the architecture has token types; where a task reads
single texts, models with token types get zeros for them inside the graph. Its outputs, all float32 but for `top_ids`:

    feature-extraction                     pooled [batch, hidden], one vector a text, not normalized
    text-classification, text-ranking      logits [batch, labels]
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from trident_export import folder as hf
from trident_export.errors import UnsupportedArchitecture
from trident_export.graphs.unpadding import unpad
from trident_serving.pooling import Pooling

INPUTS = ("input_ids", "attention_mask")
TOKEN_TYPES = "token_type_ids"
# Bytes of a graph in one file: protobuf takes 2 GiB, and a little is left for what passes add.
ONE_FILE = 2**31 - 2**20

# The transformers task whose head the model has.
_EXPORTED_AS = {"text-ranking": "text-classification"}


def export_encoder_graph(
    source: Path,
    path: Path,
    task: str,
    head: Any,
    outputs: Sequence[str],
    *,
    pairs: bool,
    top_k: int,
    pooling: Pooling | None,
) -> None:
    """Write the graph of the Hugging Face folder `source` to `path`, in float32.

    Args:
        task: the transformers pipeline's name.
        head: the Auto class of transformers for it.
        outputs: names that the graph must have, as above.
        pairs: whether `token_type_ids` is an input.
        top_k: of fill-mask.
        pooling: of feature-extraction: a vector a text is a hundredth of what the tokens' vectors are to hand on.

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
                    task=_EXPORTED_AS.get(task, task),
                    library_name="transformers",
                    do_validation=False,
                    no_post_process=True,
                    local_files_only=True,
                )
        model = onnx.load(str(Path(scratch) / "model.onnx"))
    if pairs:
        with_token_types(model)
    else:
        without_token_types(model)
    if task == "fill-mask":
        with_top_logits(model, top_k)
    if pooling is not None:
        with_pooling(model, pooling)
    expected = [*INPUTS, *([TOKEN_TYPES] if pairs else [])]
    found = [node.name for node in model.graph.input]
    given = {node.name: node for node in model.graph.output}
    if sorted(found) != sorted(expected) or not set(outputs) <= set(given):
        raise UnsupportedArchitecture(
            f"{source} gives a graph with the inputs {', '.join(found)} and the outputs {', '.join(given)}, and {task} "
            f"is served with {', '.join(expected)} and {', '.join(outputs)}: choose a model for that task"
        )
    del model.graph.output[:]
    model.graph.output.extend(given[name] for name in outputs)
    unpad(model)
    onnx.save(model, str(path), save_as_external_data=model.ByteSize() > ONE_FILE, location=path.name + ".data")


def check_architecture(source: Path, task: str, manager: Any) -> None:
    """Optimum must have a form for the folder's architecture.

    Args:
        manager: optimum's TasksManager.

    Raises:
        UnsupportedArchitecture: it has none.
    """
    kind = hf.config(source).model_type
    known = manager._SUPPORTED_MODEL_TYPE
    wanted = _EXPORTED_AS.get(task, task)
    if kind not in known or wanted not in manager.get_supported_tasks_for_model_type(
        kind, "onnx", library_name="transformers"
    ):
        raise UnsupportedArchitecture(
            f"{source} is a model of type {kind!r}, for which optimum has no ONNX form for {task}: choose another model"
        )


@contextlib.contextmanager
def _read_by_others(source: Path, head: Any) -> Iterator[None]:
    """Optimum reads the folder itself; where it fails, reading the folder once more tells whether that is why."""
    try:
        yield
    except Exception:
        hf.model(head, source)
        raise


def without_token_types(model: onnx.ModelProto) -> None:
    """Replace the input `token_type_ids`, where there is one, by zeros of the shape of `input_ids`."""
    for node in list(model.graph.input):
        if node.name == TOKEN_TYPES:
            model.graph.input.remove(node)
            zeros = helper.make_node("Sub", ["input_ids", "input_ids"], [TOKEN_TYPES], name="zero_token_types")
            model.graph.node.insert(0, zeros)


def with_token_types(model: onnx.ModelProto) -> None:
    """Add the input `token_type_ids` where the architecture has none; nothing reads it then."""
    inputs = {node.name: node for node in model.graph.input}
    if TOKEN_TYPES not in inputs:
        added = onnx.ValueInfoProto()
        added.CopyFrom(inputs["input_ids"])
        added.name = TOKEN_TYPES
        model.graph.input.append(added)


def with_top_logits(model: onnx.ModelProto, k: int) -> None:
    """Add the outputs of fill-mask: a vocabulary of logits for every token is too much to hand from stage to stage."""
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array([k], np.int64), "top_k"))
    graph.node.append(
        helper.make_node("TopK", ["logits", "top_k"], ["top_scores", "top_ids"], name="top_logits", axis=-1)
    )
    # From opset 18 on the axes are an input, as they are in the graphs that optimum writes by default.
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "last_axis"))
    inputs, attributes = (["logits", "last_axis"], {}) if opset >= 18 else (["logits"], {"axes": [-1]})
    graph.node.append(
        helper.make_node("ReduceLogSumExp", inputs, ["log_normalizer"], "log_normalizer", keepdims=0, **attributes)
    )
    rows = ["batch", "sequence"]
    graph.output.extend(
        [
            helper.make_tensor_value_info("top_scores", TensorProto.FLOAT, [*rows, k]),
            helper.make_tensor_value_info("top_ids", TensorProto.INT64, [*rows, k]),
            helper.make_tensor_value_info("log_normalizer", TensorProto.FLOAT, rows),
        ]
    )


def with_pooling(model: onnx.ModelProto, pooling: Pooling) -> None:
    """Add the output `pooled`; the numbers are those of `trident_serving.pooling.pool` for padding on the right."""
    graph = model.graph
    constants = {
        "zero": np.array(0, np.int64),
        "one": np.array([1], np.int64),
        "two": np.array([2], np.int64),
        "lowest": np.array(np.finfo(np.float32).min, np.float32),
    }
    graph.initializer.extend(numpy_helper.from_array(value, f"pooling/{name}") for name, value in constants.items())

    def add(kind: str, inputs: list[str], output: str, **attributes: object) -> None:
        graph.node.append(helper.make_node(kind, inputs, [output], name=output, **attributes))

    hidden, mask = "last_hidden_state", "attention_mask"
    if pooling is Pooling.CLS:
        add("Gather", [hidden, "pooling/zero"], "pooled", axis=1)
    elif pooling is Pooling.LAST_TOKEN:
        add("ReduceSum", [mask, "pooling/one"], "pooling/lengths", keepdims=1)
        add("Sub", ["pooling/lengths", "pooling/one"], "pooling/ends")
        add("GatherND", [hidden, "pooling/ends"], "pooled", batch_dims=1)
    elif pooling is Pooling.MAX:
        add("Unsqueeze", [mask, "pooling/two"], "pooling/column")
        add("Cast", ["pooling/column"], "pooling/real", to=TensorProto.BOOL)
        add("Where", ["pooling/real", hidden, "pooling/lowest"], "pooling/kept")
        _reduce_max(model, "pooling/kept", "pooled")
    else:
        add("Cast", [mask], "pooling/weights", to=TensorProto.FLOAT)
        add("Unsqueeze", ["pooling/weights", "pooling/one"], "pooling/row")
        add("MatMul", ["pooling/row", hidden], "pooling/sum")
        add("Squeeze", ["pooling/sum", "pooling/one"], "pooling/total")
        add("ReduceSum", ["pooling/weights", "pooling/one"], "pooling/count", keepdims=1)
        add("Div", ["pooling/total", "pooling/count"], "pooled")
    size = next(node for node in graph.output if node.name == hidden).type.tensor_type.shape.dim[2].dim_value
    graph.output.append(helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["batch", size]))


def _reduce_max(model: onnx.ModelProto, name: str, output: str) -> None:
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    inputs, attributes = ([name, "pooling/one"], {}) if opset >= 18 else ([name], {"axes": [1]})
    model.graph.node.append(helper.make_node("ReduceMax", inputs, [output], output, keepdims=0, **attributes))
