"""Watermarks: green lists, scores and z-scores are those of transformers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedConfig, WatermarkDetector, WatermarkingConfig
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    WatermarkLogitsProcessor,
)

from tests import tiny_models
from trident_serving.errors import InvalidRequest
from trident_serving.generation.request import RequestParser
from trident_serving.runtime.sampling.candidates import Candidates
from trident_serving.runtime.sampling.params import SamplingParams
from trident_serving.runtime.sampling.processors import WatermarkBias, filters, watermarks
from trident_serving.runtime.sampling.sampler import Sampler
from trident_serving.runtime.sampling.watermark import Watermark, detect
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.limits import GenerationLimits
from trident_serving.text import encode_texts

RANDOM = np.random.default_rng(7)


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (50, {}),
        (1000, {"greenlist_ratio": 0.5, "bias": 2.5}),
        (997, {"greenlist_ratio": 0.9, "hashing_key": 2**40 + 1}),
        (49_152, {}),
    ],
)
def test_scores_are_those_of_transformers(size: int, settings: dict[str, Any]) -> None:
    theirs = WatermarkLogitsProcessor(size, "cpu", **settings)
    ours = WatermarkBias(Watermark(size, **settings))
    for token in [0, 1, size - 1, *RANDOM.integers(0, size, 5).tolist()]:
        logits = (RANDOM.standard_normal(size) * 3).astype(np.float32)
        logits[::5] = -np.inf
        candidates = Candidates(logits, int(logits.argmax()))
        ours(np.array([3, token]), candidates)
        expected = theirs(torch.tensor([[3, token]]), torch.tensor(logits)[None])[0].numpy()
        np.testing.assert_array_equal(candidates.scores, expected)
        assert candidates.likeliest() == int(expected.argmax())


def test_the_mark_comes_behind_the_filters() -> None:
    """As in transformers, whose filters do not see it; the weights that a draw takes are those with the mark."""
    size, options = 200, {"temperature": 0.7, "top_k": 40, "top_p": 0.9}
    logits = (RANDOM.standard_normal(size) * 3).astype(np.float32)
    params = SamplingParams(max_tokens=1, watermark=Watermark(size), **options)  # type: ignore[arg-type]
    candidates = Candidates(logits)
    for process in (*filters(params), *watermarks(params)):
        process(np.array([5]), candidates)
    scores = torch.tensor(logits)[None]
    for warper in (
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(40),
        TopPLogitsWarper(0.9),
        WatermarkLogitsProcessor(size, "cpu"),
    ):
        scores = warper(torch.tensor([[5]]), scores)
    found = np.zeros(size)
    found[candidates.ids] = candidates.weights / candidates.weights.sum()
    np.testing.assert_allclose(found, scores.softmax(-1)[0].numpy(), atol=1e-6)


def test_a_request_without_it_has_no_processor() -> None:
    assert Sampler.causal(SamplingParams(max_tokens=1), [1], frozenset())._processors == []
    assert watermarks(SamplingParams(max_tokens=1, temperature=1.0)) == []


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("settings", [{}, {"greenlist_ratio": 0.4, "hashing_key": 99}])
def test_z_scores_are_those_of_transformers(unique: bool, settings: dict[str, Any]) -> None:
    size = 300
    watermark = Watermark(size, **settings)
    sampler = Sampler.causal(
        SamplingParams(max_tokens=200, temperature=1.0, seed=1, watermark=watermark), [4], frozenset()
    )
    marked = [sampler.choose(np.zeros(size, np.float32)) for _ in range(150)]
    config = PreTrainedConfig(vocab_size=size, bos_token_id=size)
    theirs = WatermarkDetector(config, "cpu", WatermarkingConfig(**settings), ignore_repeated_ngrams=unique)
    for tokens in (marked, RANDOM.integers(0, 20, 150).tolist()):
        found = detect(tokens, watermark, unique=unique)
        expected = theirs(torch.tensor([tokens]), return_dict=True)
        assert found.scored == expected.num_tokens_scored[0]
        assert found.green == expected.num_green_tokens[0]
        assert found.z_score == pytest.approx(expected.z_score[0], rel=1e-12)
        assert found.p_value == pytest.approx(float(expected.p_value[0]), abs=1e-12)
    assert detect(marked, watermark).z_score > 8
    assert abs(detect(marked, Watermark(size, hashing_key=7)).z_score) < 3.5  # another key finds nothing


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[1]", 'watermarking_config must be a JSON object like {"bias": 2.0}, found'),
        ({"colour": 1}, "watermarking_config has no 'colour'; known are greenlist_ratio, bias, hashing_key"),
        ({"seeding_scheme": "selfhash"}, "seeding_scheme can only be 'lefthash', found 'selfhash'"),
        ({"context_width": 2}, "context_width can only be 1, found 2"),
        ({"greenlist_ratio": 1}, "greenlist_ratio must be above 0 and below 1, found 1"),
        ({"greenlist_ratio": "x"}, "greenlist_ratio must be a number, found x"),
        ({"bias": 1e9}, r"bias must be between 0 and 100, found 1e\+09"),
        ({"bias": True}, "bias must be a number, found True"),
        ({"hashing_key": 0}, r"hashing_key must be between 1 and 2\*\*63 - 1, found 0"),
    ],
)
def test_settings_that_are_refused(config: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        _parsed(config if isinstance(config, str) else json.dumps(config))


def test_the_settings_are_those_of_transformers() -> None:
    assert _parsed(json.dumps(WatermarkingConfig().to_dict())) == Watermark(500)
    assert _parsed('{"bias": 1, "hashing_key": 5}') == Watermark(500, bias=1.0, hashing_key=5)
    assert _parsed("") is None


def _parsed(text: str) -> Watermark | None:
    tokenizer = TextTokenizer(tiny_models.byte_level_tokenizer().backend_tokenizer)
    parser = RequestParser(tokenizer, None, GenerationLimits(), vocabulary_size=500)
    inputs = {"text_input": encode_texts(["a"])[None], "watermarking_config": encode_texts([text])[None]}
    return parser.parse(inputs).sampling.watermark


def test_texts_that_can_not_be_examined() -> None:
    for tokens, message in (([5], "needs two tokens at least, found 1"), ([5, 60], "the token 60, the model has 50")):
        with pytest.raises(InvalidRequest, match=message):
            detect(tokens, Watermark(50))
