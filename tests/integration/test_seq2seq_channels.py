"""`int8_channels` of encoder-decoders: every matmul with 8-bit weights by column and 8-bit activations by token.

T5 has root-mean-square norms, mBART LayerNorms before each layer, Marian LayerNorms behind each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tests import tiny_models
from tests.conftest import some_slow
from trident_export import corpora, recipes
from trident_export.errors import FidelityError
from trident_export.graphs import editing
from trident_export.graphs.seq2seq import export_decoder, export_encoder
from trident_export.measure import fidelity
from trident_export.passes import Pass
from trident_export.passes.base import matmuls
from trident_export.passes.rotate import has_rotated_heads, is_normed
from trident_export.recipes import Kind
from trident_export.tasks import seq2seq
from trident_serving.seq2seq.decoder import Row, Seq2SeqDecoder

pytestmark = pytest.mark.usefixtures("one_thread")

CAPACITY = 24
GRAPHS = ("encoder.onnx", "decoder.onnx")
PASSES = recipes.load()["int8_channels"].passes[Kind.SEQ2SEQ]
FAMILIES = ["t5", "mbart", "marian"]
Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with the float32 graphs of a family, beside its Hugging Face folder `hf`."""
    made: dict[str, Path] = {}

    def export(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            tiny_models.make_seq2seq(folder / "hf", family, 3)
            model = AutoModelForSeq2SeqLM.from_pretrained(folder / "hf").eval()
            generator = torch.Generator().manual_seed(5)
            with torch.no_grad():  # norms and biases that are all alike are one weight in a graph
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            model.save_pretrained(folder / "hf")
            export_encoder(model, folder / "encoder.onnx")
            export_decoder(model, folder / "decoder.onnx", CAPACITY)
            made[family] = folder
        return made[family]

    return export


def changed(source: Path, target: Path, passes: tuple[Pass, ...]) -> dict[str, ir.Model]:
    """Both graphs after some passes, which are written to a folder, too."""
    for name in GRAPHS:
        editing.save(recipes.transform(editing.load(source / name), passes), target / name)
    return {name: recipes.transform(editing.load(source / name), passes) for name in GRAPHS}


def sources() -> list[list[int]]:
    random = np.random.default_rng(4)
    return [random.integers(5, 200, length).tolist() for length in (3, 41, 17, 70, 2)]


def logits(folder: Path) -> list[Floats]:
    decoder = Seq2SeqDecoder(folder, slots=10, capacity=CAPACITY, threads=1)
    texts = sources()
    targets = [[0, *ids[:9]] for ids in texts]
    return seq2seq.served_logits(decoder, texts, targets, beams=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_rotated_and_spread_graphs_compute_the_same(
    exported: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    """Norms before layers are rotated with the sum; behind Marian's, blocks are when the graph runs."""
    source = exported(family)
    rotate, keep, spread, *_ = PASSES
    found = changed(source, tmp_path, (rotate, keep, spread))
    for name, graph in found.items():
        divided = [node for node in graph.graph if node.name.startswith("spread/") and node.op_type == "Div"]
        normed = [node for node in divided if is_normed(node.inputs[0])]
        heads = [node for node in graph.graph if has_rotated_heads(node)]
        assert len(heads) == 2  # one in each layer; those of the text are read as they are
        in_layers = 2 * 2 + 1 if name == "encoder.onnx" else 2 * 3 + 1
        assert len(normed) == (0 if family == "marian" else in_layers)
        # The attention's output and the way out of the feed-forward in each layer, and what is behind other norms.
        assert len(divided) == in_layers + 2 * (2 if name == "encoder.onnx" else 3)
    for one, other in zip(logits(tmp_path), logits(source), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3 * np.abs(other).max())


@pytest.mark.parametrize("family", some_slow(FAMILIES, {"mbart"}))
def test_every_matmul_has_per_channel_weights_and_shares_its_quantization(
    exported: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    source = exported(family)
    before = {name: editing.load(source / name) for name in GRAPHS}
    names = {name: matmuls(graph) for name, graph in before.items()}
    inputs = {
        name: {node.inputs[0] for node in graph.graph if node.name in names[name]} for name, graph in before.items()
    }
    for name, graph in changed(source, tmp_path, PASSES).items():
        kinds = Counter(node.op_type for node in graph.graph)
        assert kinds["MatMulIntegerToFloat"] == len(names[name])
        assert kinds["QuantizeLinear"] == len(inputs[name])
    encoder = onnx.load(str(tmp_path / "encoder.onnx"), load_external_data=False).graph
    readers = Counter(node.input[0] for node in encoder.node if node.op_type == "MatMulIntegerToFloat")
    # Keys and values of both layers of the decoder; queries, keys and values of each layer of the encoder.
    assert sorted(readers.values(), reverse=True)[:3] == [4, 3, 3]
    for one, other in zip(logits(tmp_path), logits(source), strict=True):
        assert 1e-4 < np.abs(one - other).max() < 0.25 * np.abs(other).max()


@pytest.mark.parametrize("family", some_slow(FAMILIES, {"mbart"}))
def test_numbers_do_not_depend_on_the_company(exported: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """To the last bit: texts that are encoded and decoded together, as beams and alone."""
    changed(exported(family), tmp_path, PASSES)
    decoder = Seq2SeqDecoder(tmp_path, slots=16, capacity=CAPACITY, threads=1)
    texts = sources()
    targets = [[0, *ids[:9]] for ids in texts]
    together = seq2seq.served_logits(decoder, texts, targets, beams=3)
    for ids, target, found in zip(texts, targets, together, strict=True):
        for beams in (1, 2):
            (alone,) = seq2seq.served_logits(decoder, [ids], [target], beams)
            np.testing.assert_array_equal(alone, found)
    for text, ids in enumerate(texts):
        decoder.encode(text, ids)
    rows = [Row(text, 7, 0) for text in range(len(texts)) for _ in range(3)]
    for row, found in zip(rows, decoder.run(rows).copy(), strict=True):
        np.testing.assert_array_equal(decoder.run([row])[0], found)


def nothing(model: onnx.ModelProto) -> None:
    """The graph as it is."""


def scales_off(model: onnx.ModelProto) -> None:
    """Steps of the weights are a third too large."""
    names = {t.name for t in model.graph.initializer if t.name.endswith("/steps") and t.name.startswith("rowwise")}
    assert names
    change(model, names, lambda steps: steps * np.float32(4 / 3))


def not_turned_back(model: onnx.ModelProto) -> None:
    """Blocks are not rotated when the graph runs, but the weights behind them are."""
    names = {tensor.name for tensor in model.graph.initializer if tensor.name.startswith("spread/rotation")}
    assert names
    change(model, names, lambda matrix: np.eye(len(matrix), dtype=np.float32))


def tokens_not_scaled(model: onnx.ModelProto) -> None:
    """Tokens are divided by their largest number, and nothing is multiplied by it."""
    found = 0
    for node in model.graph.node:
        if node.op_type == "Mul" and node.name.startswith("spread/"):
            node.op_type = "Max"
            found += 1
    assert found


def change(model: onnx.ModelProto, names: set[str], function: Callable[[Floats], Floats]) -> None:
    for tensor in model.graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(numpy_helper.from_array(function(numpy_helper.to_array(tensor)), tensor.name))


@pytest.fixture(scope="module")
def gate(exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Puts the graphs of a folder, made from T5's, through the gate."""
    folder = exported("t5")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    samples = [tokenizer(text).input_ids[:40] for text in corpora.held_out()[:8]]
    targets = [seq2seq.answer_ids(model, ids, (0,), CAPACITY - 1) for ids in samples]
    reference = seq2seq.reference_logits(model, samples, targets)

    def check(graphs: Path) -> None:
        measured = seq2seq.measure(graphs / "m" / "1", samples, targets, reference, CAPACITY, 1)
        fidelity.check("translation", "int8_channels", measured, precision="int8")

    return check


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(
    "damage",
    [nothing, scales_off, not_turned_back, pytest.param(tokens_not_scaled, marks=pytest.mark.slow)],
)
def test_the_gate_refuses_damaged_graphs(
    exported: Callable[[str], Path],
    gate: Callable[[Path], None],
    tmp_path: Path,
    damage: Callable[[onnx.ModelProto], None],
    graph: str,
) -> None:
    target = tmp_path / "m" / "1"
    changed(exported("t5"), target, PASSES)
    model = onnx.load(str(target / graph))
    damage(model)
    onnx.save(model, str(target / graph))
    if damage is nothing:
        gate(tmp_path)
        return
    with pytest.raises(FidelityError, match="int8_channels does not compute .*kl is"):
        gate(tmp_path)
