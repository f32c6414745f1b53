"""Batches of padded texts in several runs: which texts run together, and that answers are those of one run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trident_serving.triton import padded_rows


def scores(lengths: list[int], width: int) -> int:
    """Scores of one head in all runs of a batch."""
    parts = padded_rows.groups(np.array(lengths), width)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    return sum(len(part) * max(lengths[row] for row in part) ** 2 for part in parts)


def test_one_long_text_does_not_pad_the_short_ones() -> None:
    """64 texts of 40 tokens beside one of 2,000: by one run, 65 texts of 2,000 tokens."""
    assert [len(part) for part in padded_rows.groups(np.array([40] * 64 + [2000]), 2916)] == [1, 64]
    assert scores([40] * 64 + [2000], 2916) == 2000**2 + 64 * 40**2
    assert scores([40] * 64 + [8000, 500], 8192) == 8000**2 + 4 * 500**2 + 61 * 40**2
    for longest in (600, 2000, 8000):
        assert scores([40] * 64 + [longest], longest) < 1.1 * longest**2 + 2**20


def test_no_run_is_larger_than_the_largest_text_makes_it() -> None:
    assert [len(part) for part in padded_rows.groups(np.full(32, 8192), 8192)] == [1] * 32
    assert [len(part) for part in padded_rows.groups(np.full(32, 1024), 1024)] == [16, 16]


@pytest.mark.parametrize(("lengths", "width"), [([5] * 15 + [256], 256), ([1024] * 4, 1024), ([3, 500], 512)])
def test_small_batches_run_as_they_are(lengths: list[int], width: int) -> None:
    (only,) = padded_rows.groups(np.array(lengths), width)
    assert only.tolist() == list(range(len(lengths)))


def test_answers_are_those_of_one_run() -> None:
    """A graph that gives a vector a text, a number a token, and repeats a text's last token in its padding."""
    random = np.random.default_rng(0)
    lengths = np.array([30, 700, 40, 1500, 9, 1400])
    ids = random.integers(0, 100, (6, 1944))
    mask = (np.arange(1944) < lengths[:, None]).astype(np.int64)
    mask[:, :3] *= 2  # tokens of a prompt
    seen: list[tuple[int, ...]] = []

    def graph(inputs: padded_rows.Tensors) -> list[NDArray[Any]]:
        seen.append(inputs["input_ids"].shape)
        real = inputs["attention_mask"] > 0
        tokens = np.cumsum(inputs["input_ids"] * real, axis=1)
        return [tokens[:, -1:].repeat(8, axis=1), tokens, np.stack([tokens, -tokens], axis=2)]

    whole = graph({"input_ids": ids, "attention_mask": mask})
    found = padded_rows.run({"input_ids": ids, "attention_mask": mask}, graph, [False, True, True])
    for one, several in zip(whole, found, strict=True):
        np.testing.assert_array_equal(one, several)
    assert seen[1:] == [(2, 1536), (2, 704), (2, 64)]


def test_a_text_pays_for_its_own_length_beyond_short_buckets() -> None:
    """One token beyond a bucket of 576 is 640 in place of 864; up to 512 a bucket is run as it is."""
    seen: list[tuple[int, ...]] = []

    def graph(inputs: padded_rows.Tensors) -> list[NDArray[Any]]:
        seen.append(inputs["input_ids"].shape)
        return [inputs["input_ids"]]

    for tokens, width in ((577, 864), (864, 864), (257, 512), (8000, 8192)):
        ids = np.arange(width)[None]
        (found,) = padded_rows.run({"input_ids": ids, "attention_mask": (ids < tokens) * 1}, graph, [True])
        np.testing.assert_array_equal(found[:, :tokens], ids[:, :tokens])
        assert found.shape == (1, width)
    assert seen == [(1, 640), (1, 864), (1, 512), (1, 8000)]


def test_what_is_padded() -> None:
    two = np.ones((2, 3), np.int64)
    assert padded_rows.is_padded({"input_ids": two, "attention_mask": two, "token_type_ids": two})
    assert not padded_rows.is_padded({"input_ids": two})
    assert not padded_rows.is_padded({"input_ids": two, "attention_mask": two, "pixels": np.ones((2, 4))})
