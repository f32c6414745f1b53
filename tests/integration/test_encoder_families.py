"""Main families of encoders: a tiny model's graph, in a padded batch and with more padding, against Hugging Face.

`make families` runs every type with every head.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from tools import families_encoders
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTextEncoding

from trident_export import recipes
from trident_export.errors import UnsupportedArchitecture
from trident_export.recipes import Kind

pytestmark = pytest.mark.usefixtures("one_thread")

EMBEDDERS = (
    "electra",
    "albert",
    "nomic_bert",
    "gte",
    "jina_embeddings_v3",
    "eurobert",
    "deberta",
    "qwen3",
    "gemma3_text",
)


@pytest.mark.parametrize("name", EMBEDDERS)
def test_an_embedder(name: str) -> None:
    config = families_encoders.tiny(name)
    assert families_encoders.check_head(config, AutoModel, ("last_hidden_state",)) == ""


# Families, with the fused operators of a graph of two layers.
FUSED = {
    "bert": {"MultiHeadAttention": 2, "SkipLayerNormalization": 4, "BiasGelu": 2, "Loop": 2, "MatMul": 8},
    "roberta": {"MultiHeadAttention": 2, "SkipLayerNormalization": 4, "BiasGelu": 2, "MatMul": 8},
    "xlm-roberta": {"MultiHeadAttention": 2, "SkipLayerNormalization": 4, "BiasGelu": 2, "MatMul": 8},
    "distilbert": {"MultiHeadAttention": 2, "SkipLayerNormalization": 5, "BiasGelu": 2, "MatMul": 8},
    "mpnet": {"MultiHeadAttention": 2, "SkipLayerNormalization": 4, "BiasGelu": 2, "MatMul": 8},
    # Sliding windows and rotated queries and keys; norms before the attention; GELU without a bias.
    "modernbert": {"MultiHeadAttention": 2, "Gelu": 2},
}


def operators(graph: onnx.GraphProto) -> Counter[str]:
    """How many nodes of each kind a graph has, in its loops, too."""
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return sum(map(operators, inner), Counter(node.op_type for node in graph.node))


def hidden(session: ort.InferenceSession, texts: list[list[int]], width: int) -> list[NDArray[np.float32]]:
    """The vectors of each text's tokens, from one batch."""
    ids = np.full((len(texts), width), families_encoders.PADDING, np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 0}
    (found,) = session.run(None, {node.name: feeds[node.name] for node in session.get_inputs()})
    return [row[: len(text)] for row, text in zip(found, texts, strict=True)]


@pytest.mark.parametrize("name", FUSED)
def test_attention_is_fused_and_a_text_s_numbers_do_not_depend_on_its_batch(name: str, tmp_path: Path) -> None:
    outputs = ("last_hidden_state",)
    source, path = families_encoders.export(families_encoders.tiny(name), AutoModel, outputs, tmp_path)
    found = operators(onnx.load(path, load_external_data=False).graph)
    assert {kind: found[kind] for kind in FUSED[name]} == FUSED[name]
    assert not {"Softmax", "Erf", "TextAttention"} & set(found)
    session = ort.InferenceSession(str(path))
    assert families_encoders.compare(source.load(AutoModel), session, outputs) == ""
    sessions = [session]
    if name == "bert":
        target = tmp_path / "int8" / "model.onnx"
        recipes.apply(recipes.load()["int8"], Kind.ENCODER, path, target)
        assert operators(onnx.load(target, load_external_data=False).graph)["QuantizeLinear"] == 8  # one for q, k and v
        sessions.append(ort.InferenceSession(str(target)))
    random = np.random.default_rng(0)
    texts = [random.integers(5, families_encoders.VOCABULARY, length).tolist() for length in (3, 40, 17, 61, 8)]
    for each in sessions:
        company = hidden(each, texts, 96)
        for text, row in zip(texts, company, strict=True):
            for width in (len(text), 64, 128):
                np.testing.assert_array_equal(hidden(each, [text], width)[0], row)


def test_what_is_no_exact_gelu_stays_as_it_is(tmp_path: Path) -> None:
    config: Any = families_encoders.tiny("bert")
    config.hidden_act = "gelu_new"
    source, path = families_encoders.export(config, AutoModel, ("last_hidden_state",), tmp_path)
    found = operators(onnx.load(path, load_external_data=False).graph)
    assert (found["Tanh"], found["BiasGelu"] + found["Gelu"], found["SkipLayerNormalization"]) == (2, 0, 4)
    session = ort.InferenceSession(str(path))
    assert families_encoders.compare(source.load(AutoModel), session, ("last_hidden_state",)) == ""


def test_the_encoder_of_an_encoder_decoder() -> None:
    config = families_encoders.tiny("t5")
    assert families_encoders.check_head(config, AutoModelForTextEncoding, ("last_hidden_state",)) == ""


def test_a_decoder_that_classifies_at_its_last_token() -> None:
    config = families_encoders.tiny("mistral")
    assert families_encoders.check_head(config, AutoModelForSequenceClassification, ("logits",)) == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fnet", "is a FNetModel, which reads no texts with an attention mask"),
        ("xlnet", "the architecture fixes sizes when it is traced"),
        ("convbert", "depends on the padding in Hugging Face too"),
    ],
)
def test_what_is_refused_is_a_sentence(name: str, message: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=message):
        families_encoders.check_head(families_encoders.tiny(name), AutoModel, ("last_hidden_state",))
