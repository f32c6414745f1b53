"""Run every graph of a repository with the ONNX Runtime that this process finds, and write what comes out.

`python run_graphs.py REPOSITORY OUTPUT.npz MODEL...`: tests/contract/test_runtime_versions.py compares versions. It
runs the code that serves, on inputs that are the same for every version; a model whose graph can't be loaded is named,
with ONNX Runtime's own message.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from trident_serving.generation.batch import SlotTokens
from trident_serving.generation.decoder import OnnxDecoder
from trident_serving.seq2seq.decoder import Row, Seq2SeqDecoder
from trident_serving.triton import onnx_session

VOCABULARY = 500


def main() -> None:
    repository, output, *names = sys.argv[1:]
    results: dict[str, NDArray[Any]] = {}
    for name in names:
        folder = Path(repository) / name / "1"
        try:
            results |= {f"{name}/{key}": value for key, value in run(folder).items()}
        except Exception as error:
            sys.exit(f"{name}: {type(error).__name__}: {error}")
    np.savez(output, version=np.array(ort.__version__), **results)


def run(folder: Path) -> dict[str, NDArray[Any]]:
    """What one model's graphs give."""
    random = np.random.default_rng(0)
    if (folder / "decoder.onnx").exists():
        return _seq2seq(folder, random)
    session, _ = onnx_session.open_session(folder, {})
    if any(node.name.startswith("past_key_values") for node in session.get_inputs()):
        return _generator(folder, random)
    feeds = {}
    for node in session.get_inputs():
        ids = random.integers(5, VOCABULARY, (3, 32))
        ids[2, 20:] = 0
        feeds[node.name] = {"attention_mask": ids.clip(max=1), "token_type_ids": ids * 0}.get(node.name, ids)
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def _generator(folder: Path, random: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Prompts in chunks, single tokens of several rows beside an idle one, and a draft."""
    decoder = OnnxDecoder(folder / "model.onnx", slots=4, context=48, longest_run=16, threads=1)
    texts = random.integers(1, VOCABULARY, (4, 30)).tolist()
    found = [decoder.run([SlotTokens(row, 0, texts[row][:12], 12)]).copy() for row in range(4)]
    for at in range(12, 20):
        found.append(decoder.run([SlotTokens(row, at, texts[row][at : at + 1]) for row in (0, 2, 3)]).copy())
    found.append(decoder.run([SlotTokens(1, 12, texts[1][12:20], 8), SlotTokens(3, 20, texts[3][20:21])]).copy())
    return {"logits": np.concatenate(found)}


def _seq2seq(folder: Path, random: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Two texts of different lengths, a token at a time; the graph has the model's longest answer as a constant."""
    decoder = Seq2SeqDecoder(folder, slots=8, capacity=40, threads=1)
    for text, length in enumerate((11, 30)):
        decoder.encode(text, random.integers(5, VOCABULARY, length).tolist())
    steps = random.integers(5, VOCABULARY, (8, 2)).tolist()
    found = [
        np.array(decoder.run([Row(text, token, position) for text, token in enumerate(tokens)]))
        for position, tokens in enumerate(steps)
    ]
    return {"logits": np.stack(found)}


if __name__ == "__main__":
    main()
