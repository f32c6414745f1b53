"""Tokenizer stage and pooling, without a model."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from trident_serving.encoders import entities
from trident_serving.encoders.embeddings import embedded
from trident_serving.encoders.labels import Activation, LabelSettings
from trident_serving.encoders.pooling import Pooling, PoolingSettings, normalize, pool
from trident_serving.encoders.task import count, flag
from trident_serving.encoders.tokens import EncodingSettings, TextEncoder, TokenRoles, prompt_name
from trident_serving.errors import InvalidRequest
from trident_serving.schema.limits import EncoderLimits
from trident_serving.schema.reading import read_parameters
from trident_serving.text import decode_texts, encode_texts


def encoder(truncate: bool = False) -> TextEncoder:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"]
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    return TextEncoder(tokenizer, EncodingSettings(max_tokens=8, max_bytes=100, buckets=(4, 8), truncate=truncate))


def test_batches_are_padded_to_the_smallest_bucket_that_holds_them() -> None:
    tensors = encoder().encode(["a b"])
    np.testing.assert_array_equal(tensors["input_ids"], [[2, 4, 5, 3]])
    np.testing.assert_array_equal(tensors["attention_mask"], [[1, 1, 1, 1]])
    tensors = encoder().encode(["A", "a b c"])
    np.testing.assert_array_equal(tensors["input_ids"], [[2, 4, 3, 0, 0, 0, 0, 0], [2, 4, 5, 6, 3, 0, 0, 0]])
    np.testing.assert_array_equal(tensors["attention_mask"].sum(axis=1), [3, 5])


def test_padding_that_is_a_part_of_the_text() -> None:
    """As SigLIP reads it: always as many tokens, none of them masked, and no text is too long."""
    words = encoder()._tokenizer
    roles = TokenRoles(unk_token_id=1, padded_to=6)
    fixed = TextEncoder(words, EncodingSettings(6, 100, (6,), truncate=False), roles)
    tensors = fixed.encode(["a", "a b c a b c a b c"])
    np.testing.assert_array_equal(tensors["input_ids"], [[2, 4, 3, 0, 0, 0], [2, 4, 5, 6, 4, 3]])
    np.testing.assert_array_equal(tensors["attention_mask"], np.ones((2, 6)))
    with pytest.raises(InvalidRequest, match=r"text_input\[1\] has 11 tokens, the model takes 6"):
        fixed.encode(["a", "a b c a b c a b c"], truncate=False)


def test_spans_are_characters_and_special_tokens_have_none() -> None:
    spans = encoder().windows(["a  b"], 1)["token_spans"]
    np.testing.assert_array_equal(spans, [[[-1, -1], [0, 1], [3, 4], [-1, -1]]])


def test_windows_overlap_and_show_each_token_once() -> None:
    texts = ["a", "a b c a b c a b c a b c", "b c"]
    found = encoder().windows(texts, 5)
    np.testing.assert_array_equal(found["window_text"], [0, 1, 1, 1, 2])  # six tokens each, of which two come again
    np.testing.assert_array_equal(found["input_ids"][1:4, 1:7], [[4, 5, 6] * 2, [5, 6, 4] * 2, [6, 4, 5, 6, 3, 0]])
    for row, text in enumerate(texts):
        starts = found["token_spans"][found["window_text"] == row, :, 0]
        assert starts[starts >= 0].tolist() == list(range(0, len(text), 2))
    assert encoder().windows(texts, 3, truncate=True)["window_text"].tolist() == [0, 1, 2]
    with pytest.raises(InvalidRequest, match="text_input takes 5 windows of 8 tokens, the limit is 4"):
        encoder().windows(texts, 4)
    with pytest.raises(InvalidRequest, match=r"text_input\[1\] is empty"):
        encoder().windows(["a", " "], 4)


def test_too_long_is_an_error_or_is_cut_before_the_closing_token() -> None:
    long = "a b c a b c a"
    with pytest.raises(InvalidRequest, match="text_input has 9 tokens, the model takes 8"):
        encoder().encode([long])
    with pytest.raises(InvalidRequest, match=r"text_input\[1\] has 9 tokens"):
        encoder(truncate=True).encode(["a", long], truncate=False)
    for tensors in (encoder().encode([long], truncate=True), encoder(truncate=True).encode([long])):
        np.testing.assert_array_equal(tensors["input_ids"], [[2, 4, 5, 6, 4, 5, 6, 3]])


def test_a_text_without_a_token() -> None:
    with pytest.raises(InvalidRequest, match="text_input is empty"):
        encoder().encode([" "])


@pytest.mark.parametrize("buckets", ["8,4", "4,4,8", "4", "4,x"])
def test_buckets_must_rise_to_the_longest(buckets: str) -> None:
    with pytest.raises(ValueError, match="buckets|invalid literal"):
        read_parameters(
            EncodingSettings, {"max_tokens": "8", "max_bytes": "9", "buckets": buckets, "truncate": "false"}
        )


def test_settings_from_a_config() -> None:
    parameters = {"max_tokens": "8", "max_bytes": "9", "buckets": "4,8", "truncate": "true"}
    assert read_parameters(EncodingSettings, parameters) == EncodingSettings(8, 9, (4, 8), True)
    with pytest.raises(ValueError, match="truncate"):
        read_parameters(EncodingSettings, parameters | {"truncate": "yes"})


@pytest.mark.parametrize("most", [64, 96, 256, 384, 512, 600, 2048, 8192])
@pytest.mark.parametrize("named", [(), (32,), (128, 256)])
def test_no_bucket_is_far_from_the_one_before(most: int, named: tuple[int, ...]) -> None:
    """What a token beyond a bucket costs: attention's share by the square, and that is most of it from 512 on."""
    named = tuple(size for size in named if size < most)
    found = EncoderLimits(max_tokens=most, buckets=named).all_buckets
    assert set(named or [size for size in (128, 256) if size < most]) < set(found)
    assert found[-1] == most
    for one, other in pairwise(found):
        assert other <= (2 if one < 512 else 1.5) * one
    assert len(found) < 16
    if most <= 512 and named == (128, 256):
        assert found == (128, 256, most)


HIDDEN = np.array([[[1, 2], [3, -4], [9, 9]], [[5, 6], [7, 8], [-1, 0]]], np.float32)
MASK = np.array([[1, 1, 0], [1, 1, 1]], np.int64)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        (Pooling.MEAN, [[2, -1], [11 / 3, 14 / 3]]),
        (Pooling.CLS, [[1, 2], [5, 6]]),
        (Pooling.LAST_TOKEN, [[3, -4], [-1, 0]]),
        (Pooling.MAX, [[3, 2], [7, 8]]),
        (Pooling.MEAN_BY_ROOT, [[4 / 2**0.5, -2 / 2**0.5], [11 / 3**0.5, 14 / 3**0.5]]),
        (Pooling.WEIGHTED_MEAN, [[7 / 3, -2], [16 / 6, 22 / 6]]),
    ],
)
def test_pooling_leaves_padding_out(pooling: Pooling, expected: list[list[float]]) -> None:
    np.testing.assert_allclose(pool(HIDDEN, MASK, pooling), expected, rtol=1e-6)


def test_pooling_with_padding_on_the_left() -> None:
    mask = np.array([[0, 1, 1]], np.int64)
    np.testing.assert_array_equal(pool(HIDDEN[:1], mask, Pooling.CLS), [[3, -4]])
    np.testing.assert_array_equal(pool(HIDDEN[:1], mask, Pooling.LAST_TOKEN), [[9, 9]])


def test_a_prompt_is_left_out_of_the_pooling() -> None:
    """As sentence-transformers' `Pooling` does with `include_prompt` false; positions are those of the whole text."""
    modes = {mode: pool(HIDDEN[1:], np.array([[2, 1, 1]]), mode)[0].tolist() for mode in Pooling}
    assert modes[Pooling.MEAN] == [3, 4]
    assert modes[Pooling.CLS] == [7, 8]
    assert modes[Pooling.LAST_TOKEN] == [-1, 0]
    assert modes[Pooling.MAX] == [7, 8]
    np.testing.assert_allclose(modes[Pooling.WEIGHTED_MEAN], [11 / 5, 16 / 5], rtol=1e-6)


def test_normalize_equals_torch() -> None:
    vectors = np.array([[3, 4], [0, 0], [1e-20, 0]], np.float32)
    expected = torch.nn.functional.normalize(torch.tensor(vectors), dim=1).numpy()
    np.testing.assert_allclose(normalize(vectors), expected, atol=1e-7)


def test_a_request_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    nothing = np.empty((0, 1), np.object_)
    with pytest.raises(InvalidRequest, match="text_input is empty: it must hold one text"):
        encoder().windows([], 4)
    (tmp_path / "tokenizer.json").write_text(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str())
    TokenRoles().save(tmp_path)
    LabelSettings(("O",), Activation.SOFTMAX).save(tmp_path)
    postprocess = entities.TASK.postprocess(tmp_path, {"aggregation": "simple"})
    with pytest.raises(InvalidRequest, match="aggregation_strategy is empty: it must hold a text, or be left out"):
        postprocess({"aggregation_strategy": nothing, "text_input": encode_texts(["a"])[:, None]})
    with pytest.raises(InvalidRequest, match="truncate is empty"):
        flag({"truncate": np.empty((0, 1), np.bool_)}, "truncate")
    with pytest.raises(InvalidRequest, match="top_k is empty"):
        count({"top_k": np.empty(0, np.int32)}, "top_k", 1, 3, "labels")
    with pytest.raises(InvalidRequest, match="prompt_name must be the same"):
        prompt_name({"prompt_name": nothing})


@pytest.mark.parametrize(("asked", "found"), [([0], "0"), ([9, 8], "8, 9"), ([-1], "-1")])
def test_dimensions_that_a_model_has_not(asked: list[int], found: str) -> None:
    tensors = {"pooled": np.ones((1, 16), np.float32), "dimensions": np.array(asked, np.int32)}
    with pytest.raises(InvalidRequest, match=f"dimensions must be one of 8, 16 for all texts .*, found {found}$"):
        embedded(tensors, PoolingSettings(Pooling.MEAN, normalize=True), [8])


def test_texts_of_tensors() -> None:
    tensor = encode_texts(["a", "中"]).reshape(2, 1)
    assert decode_texts(tensor, "text") == ["a", "中"]
    with pytest.raises(InvalidRequest, match=r"text\[1\] is not UTF-8: byte 0xff at offset 1 of 2"):
        decode_texts(np.array([b"a", b"b\xff"], np.object_), "text")
    with pytest.raises(InvalidRequest, match=r"text\[1\] has 3 bytes, the limit is 2 bytes"):
        decode_texts(tensor, "text", max_bytes=2)
