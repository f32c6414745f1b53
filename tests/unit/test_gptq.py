"""Rounding by GPTQ, and the rotation that comes before it, on matrices."""

from __future__ import annotations

import numpy as np
import pytest

from trident_export.passes.gptq import round_weights
from trident_export.passes.rotate import rotation


@pytest.fixture
def activations() -> np.ndarray:
    """Rows of 48 channels of which only 12 are independent."""
    random = np.random.default_rng(0)
    mixed = random.standard_normal((400, 12)) @ random.standard_normal((12, 48))
    return (mixed + 0.1 * random.standard_normal((400, 48))).astype(np.float32)


@pytest.mark.parametrize("damp", [0.001, 0.1])
def test_matmuls_are_closer_than_those_of_the_nearest_numbers(activations: np.ndarray, damp: float) -> None:
    weight = np.random.default_rng(1).standard_normal((48, 30)).astype(np.float32)
    steps = np.abs(weight).max(axis=0, keepdims=True) / 7
    seen, fresh = activations[:200], activations[200:]
    found = round_weights(weight, steps, seen.T @ seen, damp, (-7, 7))
    np.testing.assert_array_equal(found, np.clip(np.rint(found), -7, 7))
    nearest = np.clip(np.rint(weight / steps), -7, 7)

    def error(numbers: np.ndarray) -> float:
        return float(np.square(fresh @ (numbers * steps - weight)).mean())

    assert error(found) < 0.3 * error(nearest)


def test_channels_that_have_nothing_in_common_are_rounded_to_the_nearest_number() -> None:
    weight = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)
    steps = np.full((6, 4), 0.25, np.float32)
    np.testing.assert_array_equal(
        round_weights(weight, steps, np.eye(6, dtype=np.float32), 0.1, (-100, 100)), np.rint(weight / steps)
    )


@pytest.mark.parametrize("channels", [48, 47])
def test_two_neighbours_of_one_sign_are_within_sixteen_bits(activations: np.ndarray, channels: int) -> None:
    """Times 255, the largest activation, they are less than 2^15."""
    weight = np.abs(np.random.default_rng(1).standard_normal((channels, 30))).astype(np.float32) + 1
    weight[:, 15:] *= -1
    steps = np.abs(weight).max(axis=0, keepdims=True) / 100  # much too small
    part = activations[:, :channels]
    found = round_weights(weight, steps, part.T @ part, 0.1, (-127, 127), pair=128)
    pairs = np.pad(found, ((0, channels % 2), (0, 0))).reshape(-1, 2, 30).sum(axis=1)
    assert np.abs(pairs).max() == 128
    assert np.abs(found).max() <= 127
    assert 255 * 128 < 2**15


@pytest.mark.parametrize("channels", [1, 2, 7, 64, 96, 576, 960])
def test_a_rotation_keeps_lengths_and_spreads_every_channel(channels: int) -> None:
    turn = rotation(channels, 0).astype(np.float64)
    np.testing.assert_allclose(turn @ turn.T, np.eye(channels), atol=1e-5)
    assert np.abs(turn).max() < 1.5 / np.sqrt(channels)
    assert (turn != rotation(channels, 1)).any() or channels == 1
