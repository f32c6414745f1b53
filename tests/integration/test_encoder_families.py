"""Main families of encoders: a tiny model's graph, in a padded batch and with more padding, against Hugging Face.

`make families` runs every type with every head.
"""

from __future__ import annotations

import pytest
from tools import families_encoders
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTextEncoding

from trident_export.errors import UnsupportedArchitecture

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
