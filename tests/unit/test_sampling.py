"""The sampler against the transformers logits processors of the same names."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from trident_serving.errors import BrokenModel, InvalidRequest
from trident_serving.runtime.log_probabilities import log_probabilities
from trident_serving.runtime.sampling.candidates import Candidates
from trident_serving.runtime.sampling.params import SamplingParams
from trident_serving.runtime.sampling.processors import (
    BadWords,
    ForcedTokens,
    LogitsProcessor,
    MinLength,
    NoRepeatNGram,
    RepetitionPenalty,
    SuppressTokens,
    filters,
)
from trident_serving.runtime.sampling.sampler import Sampler
from trident_serving.seq2seq.rules import Rules

RANDOM = np.random.default_rng(0)
LOGITS = (RANDOM.standard_normal(200) * 3).astype(np.float32)


def transformers_distribution(*warpers: object) -> np.ndarray:
    scores = torch.tensor(LOGITS)[None]
    for warper in warpers:
        scores = warper(torch.tensor([[0]]), scores)  # type: ignore[operator]
    return scores.softmax(-1)[0].numpy()


def distribution(options: dict[str, float], logits: np.ndarray = LOGITS) -> np.ndarray:
    candidates = Candidates(logits)
    for process in filters(SamplingParams(max_tokens=1, **options)):  # type: ignore[arg-type]
        process(np.zeros(0, np.int64), candidates)
    found = np.zeros(logits.size)
    found[slice(None) if candidates.ids is None else candidates.ids] = candidates.weights / candidates.weights.sum()
    return found


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_k": 5}, [TopKLogitsWarper(5)]),
        ({"temperature": 1.0, "top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        (
            {"temperature": 1.5, "top_k": 20, "top_p": 0.5},
            [TemperatureLogitsWarper(1.5), TopKLogitsWarper(20), TopPLogitsWarper(0.5)],
        ),
        ({"temperature": 1.0, "top_p": 0.01}, [TopPLogitsWarper(0.01)]),
        ({"temperature": 1.0, "top_k": 1000}, []),
        ({"temperature": 1.0, "min_p": 0.05}, [MinPLogitsWarper(0.05)]),
        ({"temperature": 1.0, "min_p": 1.0}, [MinPLogitsWarper(1.0)]),
        (
            {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "min_p": 0.1},
            [TemperatureLogitsWarper(2.0), TopKLogitsWarper(50), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)],
        ),
        ({"temperature": 1.0, "typical_p": 0.9}, [TypicalLogitsWarper(0.9)]),
        ({"temperature": 1.0, "typical_p": 0.2}, [TypicalLogitsWarper(0.2)]),  # without the likeliest token
        ({"temperature": 0.6, "typical_p": 0.999}, [TemperatureLogitsWarper(0.6), TypicalLogitsWarper(0.999)]),
        (
            {"temperature": 1.7, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.7},
            [
                TemperatureLogitsWarper(1.7),
                TopKLogitsWarper(40),
                TopPLogitsWarper(0.95),
                MinPLogitsWarper(0.02),
                TypicalLogitsWarper(0.7),
            ],
        ),
    ],
)
def test_distributions_equal_transformers(options: dict[str, float], warpers: list[object]) -> None:
    np.testing.assert_allclose(distribution(options), transformers_distribution(*warpers), atol=1e-6)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99, 0.999])
def test_top_p_over_a_large_vocabulary_equals_transformers(top_p: float) -> None:
    logits = (RANDOM.standard_normal(50_000) * 2).astype(np.float32)
    expected = TopPLogitsWarper(top_p)(torch.tensor([[0]]), torch.tensor(logits, dtype=torch.float64)[None])
    found = distribution({"temperature": 1.0, "top_p": top_p}, logits)
    np.testing.assert_allclose(found, expected.softmax(-1)[0].numpy(), atol=1e-7)


@pytest.mark.parametrize("typical_p", [0.1, 0.5, 0.9, 0.99])
def test_typical_p_over_a_large_vocabulary_with_forbidden_tokens_equals_transformers(typical_p: float) -> None:
    logits = (RANDOM.standard_normal(50_000) * 2).astype(np.float32)
    logits[::7] = -np.inf
    expected = TypicalLogitsWarper(typical_p)(torch.tensor([[0]]), torch.tensor(logits, dtype=torch.float64)[None])
    found = distribution({"temperature": 1.0, "typical_p": typical_p}, logits)
    np.testing.assert_allclose(found, expected.softmax(-1)[0].numpy(), atol=1e-7)


def test_draws_follow_the_distribution() -> None:
    params = SamplingParams(max_tokens=1, temperature=1.0, top_k=4, seed=3)
    sampler = Sampler.causal(params, [], frozenset())
    draws = np.bincount([sampler.choose(LOGITS) for _ in range(4000)], minlength=200) / 4000
    np.testing.assert_allclose(draws, distribution({"temperature": 1.0, "top_k": 4}), atol=0.03)


def test_repetition_penalty_equals_transformers() -> None:
    prompt = [3, 17, 17, 50]
    sampler = Sampler.causal(SamplingParams(max_tokens=9, repetition_penalty=1.8), prompt, frozenset())
    chosen = [sampler.choose(LOGITS) for _ in range(6)]
    ids = torch.tensor([prompt])
    for token in chosen:
        scores = RepetitionPenaltyLogitsProcessor(1.8)(ids, torch.tensor(LOGITS)[None].clone())
        assert int(scores.argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    assert len(set(chosen)) > 1


@pytest.mark.parametrize("length", [1, 2, 5, 8])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (RepetitionPenalty(1.3), RepetitionPenaltyLogitsProcessor(1.3)),
        (NoRepeatNGram(1), NoRepeatNGramLogitsProcessor(1)),
        (NoRepeatNGram(3), NoRepeatNGramLogitsProcessor(3)),
        (BadWords(((7,), (1, 2), (5, 6, 8))), NoBadWordsLogitsProcessor([[7], [1, 2], [5, 6, 8]])),
        (MinLength(5, (3, 4)), MinLengthLogitsProcessor(5, [3, 4])),
        (ForcedTokens(1, (9,)), ForcedBOSTokenLogitsProcessor(9)),
        (ForcedTokens(8, (3,)), ForcedEOSTokenLogitsProcessor(9, 3)),
        (SuppressTokens((2, 11)), SuppressTokensLogitsProcessor([2, 11])),
        (SuppressTokens((2, 11), 2), SuppressTokensAtBeginLogitsProcessor([2, 11], 2)),
    ],
)
def test_what_seq2seq_forbids_and_forces_equals_transformers(
    ours: LogitsProcessor, theirs: Callable[..., torch.Tensor], length: int
) -> None:
    tokens = np.array([5, 1, 5, 1, 5, 6, 5, 1], np.int64)[:length]
    expected = theirs(torch.tensor(tokens)[None], torch.tensor(LOGITS)[None].clone())[0].numpy()
    candidates = Candidates(LOGITS, int(LOGITS.argmax()))
    ours(tokens, candidates)
    assert candidates.likeliest() == int(expected.argmax())
    np.testing.assert_array_equal(candidates.scores, expected)
    scores = LOGITS.copy()  # as beam search does it
    ours(tokens, Candidates(scores, in_place=True))
    np.testing.assert_array_equal(scores, expected)


def test_min_tokens_equals_transformers() -> None:
    eos = int(LOGITS.argmax())
    sampler = Sampler.causal(SamplingParams(max_tokens=9, min_tokens=2), [1], frozenset([eos]))
    chosen = [sampler.choose(LOGITS) for _ in range(3)]
    processor = MinNewTokensLengthLogitsProcessor(1, 2, [eos])
    expected = int(processor(torch.tensor([[1]]), torch.tensor(LOGITS)[None].clone()).argmax())
    assert chosen == [expected, expected, eos]


def test_presence_and_frequency_penalties_count_generated_tokens_only() -> None:
    logits = np.array([1.0, 0.95, 0.0], np.float32)
    presence = Sampler.causal(SamplingParams(max_tokens=9, presence_penalty=0.1), [0], frozenset())
    assert [presence.choose(logits) for _ in range(3)] == [0, 1, 0]
    frequency = Sampler.causal(SamplingParams(max_tokens=9, frequency_penalty=0.04), [1], frozenset())
    assert [frequency.choose(logits) for _ in range(4)] == [0, 0, 1, 0]


def test_the_logits_are_left_as_they_are() -> None:
    before = LOGITS.copy()
    params = SamplingParams(
        max_tokens=9, min_tokens=3, temperature=1.0, top_k=3, top_p=0.5, repetition_penalty=2.0, presence_penalty=1.0
    )
    sampler = Sampler.causal(params, [1, 2], frozenset([0]))
    for _ in range(4):
        sampler.choose(LOGITS)
    np.testing.assert_array_equal(LOGITS, before)


def test_a_greedy_request_without_options_has_no_processors() -> None:
    assert Sampler.causal(SamplingParams(max_tokens=9), [1, 2], frozenset([0]))._processors == []
    assert Rules(max_length=9, eos_token_ids=(0,)).processors() == []


def test_the_vocabulary_is_copied_only_where_a_forbidden_token_would_be_chosen() -> None:
    likeliest = int(LOGITS.argmax())
    for eos, copied in ((likeliest, True), (likeliest - 1, False)):
        candidates = Candidates(LOGITS, likeliest)
        MinLength(5, (eos,))(np.zeros(4, np.int64), candidates)
        assert (candidates.likeliest() == likeliest) is not copied
        assert np.shares_memory(candidates._scores, LOGITS) is not copied


def test_seeds() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler.causal(SamplingParams(max_tokens=9, temperature=2.0, seed=seed), [], frozenset())
        return [sampler.choose(LOGITS) for _ in range(20)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)
    assert draw(2**64 - 1) == draw(2**64 - 1)


def test_log_probabilities_equal_torch() -> None:
    expected = torch.tensor(LOGITS).log_softmax(-1)
    values, tokens = expected.topk(5)
    for token in (0, 7, int(LOGITS.argmax())):
        found = log_probabilities(LOGITS, token, 5)
        assert found.chosen == pytest.approx(float(expected[token]), abs=1e-5)
        assert [index for index, _ in found.top] == tokens.tolist()
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert log_probabilities(LOGITS, 3, 0).top == ()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(value: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[50] = value
    with pytest.raises(BrokenModel):
        Sampler.causal(SamplingParams(max_tokens=1, temperature=temperature), [], frozenset()).choose(logits)


def test_one_random_number_is_taken_for_each_token() -> None:
    """So a seed gives the same answer with and without top-k, where both keep the same tokens."""
    base = {"max_tokens": 9, "temperature": 0.1, "seed": 4}
    plain, filtered = (Sampler.causal(SamplingParams(**base, **more), [], frozenset()) for more in ({}, {"top_k": 150}))  # type: ignore[arg-type]
    assert [plain.choose(LOGITS) for _ in range(30)] == [filtered.choose(LOGITS) for _ in range(30)]


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": -1},
        {"max_tokens": 2, "min_tokens": 3},
        {"max_tokens": 2, "min_tokens": -1},
        {"max_tokens": 2, "temperature": -0.1},
        {"max_tokens": 2, "temperature": float("nan")},
        {"max_tokens": 2, "top_p": -0.1},
        {"max_tokens": 2, "top_p": 1.1},
        {"max_tokens": 2, "typical_p": 0.0},
        {"max_tokens": 2, "typical_p": 1.1},
        {"max_tokens": 2, "top_k": -1},
        {"max_tokens": 2, "min_p": -0.1},
        {"max_tokens": 2, "min_p": 1.1},
        {"max_tokens": 2, "repetition_penalty": 0.0},
        {"max_tokens": 2, "frequency_penalty": 2.1},
    ],
)
def test_values_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match="must be"):
        SamplingParams(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"typical_p": 0.5}])
@pytest.mark.parametrize("small", ["temperature", "repetition_penalty", "both"])
def test_the_smallest_numbers_choose_the_likeliest(options: dict[str, float], small: str) -> None:
    """Scores divided by them would be infinite, and what is drawn then no token of the model."""
    fields = {"temperature": 1e-44 if small != "repetition_penalty" else 1.0, **options}
    fields |= {} if small == "temperature" else {"repetition_penalty": 1e-44}
    sampler = Sampler.causal(SamplingParams(max_tokens=9, seed=1, **fields), [7], frozenset())  # type: ignore[arg-type]
    logits = np.abs(LOGITS)
    expected = int(logits.argmax()) if small == "temperature" else 7  # whose score is many times larger
    assert sampler.choose(logits) == expected
    assert 0 <= sampler.choose(logits) < logits.size


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"typical_p": 0.5}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_whose_tokens_are_forbidden(temperature: float, options: dict[str, float]) -> None:
    fields = {"temperature": temperature, **options}
    params = SamplingParams(max_tokens=9, bad_words=((3,), (5,)), **fields)  # type: ignore[arg-type]
    mask = np.zeros(LOGITS.size, np.bool_)
    mask[[3, 5]] = True
    with pytest.raises(InvalidRequest, match="the grammar and the request's other fields leave no token"):
        Sampler.causal(params, [], frozenset()).choose(LOGITS, mask)
