"""Weights in pairs: near what they were, and never too large together for sums of sixteen bits."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from trident_export.passes import pairs

WEIGHTS = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
    elements=st.floats(-4, 4, width=32, allow_subnormal=False),
)


@given(WEIGHTS)
@settings(max_examples=300, deadline=None)
def test_no_pair_is_too_large_and_all_are_near(weight: pairs.Floats) -> None:
    steps = pairs.steps(weight)
    found = pairs.rounded(weight, steps).astype(np.int32)
    assert np.abs(found).max() <= 127
    even = np.pad(found, ((0, len(found) % 2), (0, 0)))
    one, other = even[0::2], even[1::2]
    assert np.abs(one + other)[one * other > 0].max(initial=0) <= 128
    off = np.abs(found - weight / steps)
    assert off.max() <= 1.0001
    assert (off > 0.5001).sum() <= (np.abs(one + other) == 128).sum()  # only where a pair had to be made less


def test_the_steps_are_the_smallest() -> None:
    weight = np.array([[1.0, 3.0], [1.0, -3.0], [0.5, 0.1]], np.float32)
    np.testing.assert_allclose(pairs.steps(weight), [2 / 128, 3 / 127], rtol=1e-6)
    np.testing.assert_array_equal(pairs.rounded(weight, pairs.steps(weight)), [[64, 127], [64, -127], [32, 4]])


def test_of_a_pair_that_is_too_large_the_one_rounded_up_further_is_less() -> None:
    step = np.array([1.0], np.float32)
    np.testing.assert_array_equal(pairs.rounded(np.array([[64.4], [63.6]], np.float32), step), [[64], [64]])
    np.testing.assert_array_equal(pairs.rounded(np.array([[64.5001], [63.5]], np.float32), step), [[65], [63]])
    np.testing.assert_array_equal(pairs.rounded(np.array([[-63.6], [-64.6]], np.float32), step), [[-63], [-65]])
