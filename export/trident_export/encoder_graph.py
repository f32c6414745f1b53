"""Export of an encoder through optimum, with one contract for every architecture.

The graph that is left has the inputs `input_ids` and `attention_mask` (int64 [batch, sequence]) and the
output `last_hidden_state` (float32 [batch, sequence, hidden]). Models with token types get zeros for them
inside the graph: the tasks that use it send single texts.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from pathlib import Path

import onnx
from onnx import helper

INPUTS = ("input_ids", "attention_mask")
OUTPUT = "last_hidden_state"


def export_encoder_graph(source: Path, path: Path) -> None:
    """Write the graph of the Hugging Face folder `source` to `path`, in float32."""
    from optimum.exporters.onnx import main_export

    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            # "transformers": optimum would otherwise export a sentence-transformers graph with the pooling inside.
            main_export(
                str(source),
                output=scratch,
                task="feature-extraction",
                library_name="transformers",
                do_validation=False,
                no_post_process=True,
                local_files_only=True,
            )
        model = onnx.load(str(Path(scratch) / "model.onnx"))
    without_token_types(model)
    found = [node.name for node in model.graph.input]
    if sorted(found) != sorted(INPUTS) or OUTPUT not in [node.name for node in model.graph.output]:
        raise ValueError(f"the graph has the inputs {found}; expected {INPUTS} -> {OUTPUT}")
    del model.graph.output[[node.name for node in model.graph.output].index(OUTPUT) + 1 :]
    onnx.save(model, str(path))


def without_token_types(model: onnx.ModelProto) -> None:
    """Replace the input `token_type_ids`, where there is one, by zeros of the shape of `input_ids`."""
    for node in list(model.graph.input):
        if node.name == "token_type_ids":
            model.graph.input.remove(node)
            zeros = helper.make_node("Sub", ["input_ids", "input_ids"], ["token_type_ids"], name="zero_token_types")
            model.graph.node.insert(0, zeros)
