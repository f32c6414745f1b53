"""Export of an encoder through optimum, with one contract for every architecture.

The graph that is left has the inputs `input_ids` and `attention_mask`, and for tasks that read pairs of texts
`token_type_ids`, int64 [batch, sequence] each, whether or not the architecture has token types; where a task reads
single texts, models with token types get zeros for them inside the graph. Its outputs, all float32 but for `top_ids`:

    feature-extraction                     last_hidden_state [batch, sequence, hidden]
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
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

INPUTS = ("input_ids", "attention_mask")
TOKEN_TYPES = "token_type_ids"

# The transformers task whose head the model has.
_EXPORTED_AS = {"text-ranking": "text-classification"}


def export_encoder_graph(
    source: Path, path: Path, task: str, outputs: Sequence[str], *, pairs: bool, top_k: int
) -> None:
    """Write the graph of the Hugging Face folder `source` to `path`, in float32.

    Args:
        task: the transformers pipeline's name.
        outputs: names that the graph must have, as above.
        pairs: whether `token_type_ids` is an input.
        top_k: of fill-mask.

    Raises:
        ValueError: optimum gave a graph with other inputs or outputs.
    """
    from optimum.exporters.onnx import main_export

    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
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
    expected = [*INPUTS, *([TOKEN_TYPES] if pairs else [])]
    found = [node.name for node in model.graph.input]
    given = {node.name: node for node in model.graph.output}
    if sorted(found) != sorted(expected) or not set(outputs) <= set(given):
        raise ValueError(f"the graph has {found} -> {list(given)}; expected {expected} -> {list(outputs)}")
    del model.graph.output[:]
    model.graph.output.extend(given[name] for name in outputs)
    onnx.save(model, str(path))


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
