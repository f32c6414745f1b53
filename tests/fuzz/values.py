"""Values that a caller could send."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

SURROGATES = st.text(st.characters(), max_size=12) | st.sampled_from(
    ["", "\ud800", "\x00", "<|im_end|>", "{{ x }}", "é" * 40]
)
NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([0, 1, -1, 2**31, 2**63, 1e308, 1e-320])
LEAVES = st.none() | st.booleans() | NUMBERS | SURROGATES
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(SURROGATES, inner, max_size=4),
    max_leaves=12,
)


def near(value: Any) -> st.SearchStrategy[Any]:
    """The value with something in it replaced, left out or added, or the value as it is."""
    choices: list[st.SearchStrategy[Any]] = [st.just(value), JSON]
    if isinstance(value, dict) and value:
        keys = st.sampled_from(sorted(value))
        choices.append(keys.flatmap(lambda key: near(value[key]).map(lambda new: value | {key: new})))
        choices.append(keys.map(lambda key: {name: each for name, each in value.items() if name != key}))
        choices.append(st.builds(lambda key, new: value | {key: new}, SURROGATES, JSON))
    if isinstance(value, list):
        choices.append(st.just([]))
        choices.append(JSON.map(lambda new: [*value, new]))
        if value:
            choices.append(near(value[0]).map(lambda new: [new, *value[1:]]))
    return st.one_of(choices)
