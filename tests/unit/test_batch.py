"""Packed runs and the cache, with only numpy."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trident_serving import memory
from trident_serving.generation.batch import MAX_POSITIONS, Rows, SlotTokens, pack, split
from trident_serving.runtime.kv_cache import KVCache


def test_a_packed_run() -> None:
    batch = pack([SlotTokens(4, 10, [7, 8, 9], 2), SlotTokens(2, 5, [6])])
    assert (batch.first_slot, batch.slots) == (2, 3)
    assert batch.input_ids.tolist() == [[7, 8, 9, 6]]
    assert batch.position_ids.tolist() == [[10, 11, 12, 5]]
    # Slot 3 is idle; slot 2 has a second position for the sake of the sums, which repeats its token.
    assert batch.attention_tokens[:, :, 1].tolist() == [[3, 3, 3], [0, 0, 0], [0, 1, 2]]
    assert batch.query_seqlens.tolist() == [2, 0, 3]
    assert batch.seqlens_k.tolist() == [6, 0, 12]
    assert batch.attention_places.tolist() == [[[2, 0], [2, 1], [2, 2], [0, 0]]]
    assert batch.logits_tokens.tolist() == [1, 2, 3]


def test_a_second_row_where_the_processor_sums_one_otherwise() -> None:
    """It repeats the last token and stands at the end, where no slot, position or logit looks."""
    plain, padded = (pack([SlotTokens(2, 5, [6])], rows=Rows(count, 1)) for count in (1, 2))
    assert (plain.input_ids.tolist(), padded.input_ids.tolist()) == ([[6]], [[6, 6]])
    assert padded.position_ids.tolist() == [[5, 5]]
    assert padded.attention_places.tolist() == [[[0, 0], [0, 0]]]
    for name in ("attention_tokens", "query_seqlens", "seqlens_k", "logits_tokens"):
        assert getattr(padded, name).tolist() == getattr(plain, name).tolist()
    assert pack([SlotTokens(2, 5, [6])], rows=Rows(2, 2)).logits_tokens.tolist() == [0, 0]
    assert pack([SlotTokens(2, 5, [6, 7], 0)], rows=Rows(2, 2)).logits_tokens.tolist() == []
    assert pack([SlotTokens(1, 10, [7]), SlotTokens(0, 5, [6])], rows=Rows(2, 2)).input_ids.tolist() == [[7, 6]]


def test_every_token_has_its_adapter() -> None:
    items = [SlotTokens(2, 5, [6, 7], adapter=3), SlotTokens(0, 1, [8])]
    assert pack(items).adapters.tolist() == [[3, 3, 0]]
    assert pack(items[:1], rows=Rows(4, 1)).adapters.tolist() == [[3, 3, 3, 3]]


def test_where_states_find_their_tokens() -> None:
    """Slots 2 and 4 with a token and with three; slot 3 is idle."""
    batch = pack([SlotTokens(2, 7, [5]), SlotTokens(4, 0, [1, 2, 3])])
    assert batch.state_tokens.tolist() == [[0, 0, 0], [0, 0, 0], [1, 2, 3]]
    assert batch.state_mask[..., 0].tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert batch.state_slots.tolist() == [0, 2]
    assert batch.state_starts.tolist() == [0, 1, 4]
    single = pack([SlotTokens(0, 7, [5]), SlotTokens(1, 0, [1])])
    assert single.state_tokens.tolist() == [[0], [1]]  # attention has a second position, states have none


def test_runs_with_few_positions_that_hold_no_token() -> None:
    items = [SlotTokens(slot, 0, [1] * length) for slot, length in ((0, 40), (1, 40), (3, 40), (4, 1), (5, 1))]
    slots = [[item.slot for item in run] for run in split(items, max_padding=64)]
    assert slots == [[0, 1, 3], [4, 5]]
    assert [[item.slot for item in run] for run in split(items)] == [[0, 1, 3, 4, 5]]


def test_a_position_for_each_token_where_sums_allow_it() -> None:
    batch = pack([SlotTokens(1, 10, [7]), SlotTokens(0, 5, [6])], min_positions=1)
    assert batch.attention_tokens.tolist() == [[[0, 1]], [[0, 0]]]
    assert batch.query_seqlens.tolist() == [1, 1]
    assert batch.seqlens_k.tolist() == [5, 10]


@pytest.mark.parametrize(("tokens", "positions"), [(16, 16), (17, 18), (18, 18), (33, 34), (65, 66), (129, 130)])
def test_no_position_is_left_over_behind_the_parts_of_attention(tokens: int, positions: int) -> None:
    """The last one would be a part of its own, whose sums are in another order."""
    batch = pack([SlotTokens(0, 3, [7] * tokens), SlotTokens(1, 0, [8, 9])])
    assert batch.query_seqlens.tolist() == [positions, 2]
    assert batch.attention_tokens.shape == (2, positions, 2)
    assert batch.seqlens_k.tolist() == [3 + positions - 1, 1]


def test_a_short_text_of_large_heads_has_more_positions() -> None:
    """They repeat its last token; one that has enough keys, or brings them, has no more than others have."""
    items = [SlotTokens(0, 3, [6]), SlotTokens(1, 10, [7]), SlotTokens(3, 0, [1, 2, 3, 4, 5, 6, 7, 8, 9])]
    batch = pack(items, min_keys=7)
    assert batch.query_seqlens.tolist() == [4, 2, 0, 9]
    assert batch.seqlens_k.tolist() == [6, 11, 0, 8]
    assert batch.attention_tokens[0, :, 1].tolist() == [0] * 9
    assert batch.position_ids.tolist() == [[3, 10, *range(9)]]
    assert batch.state_mask.shape == (4, 9, 1)
    assert pack(items[:1], min_keys=7).attention_tokens.shape == (1, 4, 2)
    assert pack(items[:1], min_keys=7).state_mask.shape == (1, 1, 1)


def test_runs_of_short_texts_of_large_heads_are_smaller() -> None:
    items = [SlotTokens(slot, 3, [1]) for slot in range(12)]
    runs = [[item.slot for item in run] for run in split(items, min_keys=65)]
    assert runs == [list(range(8)), list(range(8, 12))]  # 62 positions each
    assert len(split(items)) == 1
    # A state has no such positions.
    assert [len(run) for run in split(items, min_keys=65, max_padding=0)] == [8, 4]


def test_idle_slots_write_behind_what_they_hold() -> None:
    """Without `query_seqlens` every slot of the window takes part, the idle slot 2 with it."""
    held = np.array([9, 5, 7, 4], np.int64)
    batch = pack([SlotTokens(3, 4, [7]), SlotTokens(1, 5, [6])], min_positions=1, held=held)
    assert (batch.first_slot, batch.slots) == (1, 3)
    assert batch.seqlens_k.tolist() == [5, 7, 4]
    assert batch.position_ids.tolist() == [[4, 5]]
    assert held.tolist() == [9, 5, 7, 4]
    single = pack([SlotTokens(0, 2, [7, 8, 9])], min_positions=2, held=held)  # starts again at 2, whatever it held
    assert single.seqlens_k.tolist() == [4]


def test_runs_of_one_slot_or_of_single_tokens() -> None:
    items = [SlotTokens(5, 0, [1]), SlotTokens(0, 3, [1, 2]), SlotTokens(2, 0, [1]), SlotTokens(4, 0, [1, 2, 3])]
    runs = split(items, 1, ragged=False)
    assert [[item.slot for item in run] for run in runs] == [[0], [4], [2, 5]]
    assert [[item.slot for item in run] for run in split(items, 2, ragged=False)] == [[0], [2], [4], [5]]
    assert [[item.slot for item in run] for run in split(items, 2)] == [[0, 2, 4, 5]]


@given(
    st.dictionaries(st.integers(0, 40), st.lists(st.integers(0, 9), min_size=1, max_size=300), min_size=1, max_size=12)
)
def test_every_token_stands_in_its_position(slots: dict[int, list[int]]) -> None:
    items = [SlotTokens(slot, slot * 3, tokens) for slot, tokens in slots.items()]
    runs = split(items)
    assert sorted(item.slot for run in runs for item in run) == sorted(slots)
    for run in runs:
        batch = pack(run)
        positions = batch.attention_tokens.shape[1]
        assert len(run) == 1 or batch.slots * positions <= MAX_POSITIONS
        spread = batch.input_ids[0][batch.attention_tokens[..., 1]]  # [slots, positions]
        for item in run:
            slot = item.slot - batch.first_slot
            count = len(item.tokens)
            assert spread[slot, :count].tolist() == item.tokens
            taken = count + 1 if count > 2 and count % 16 == 1 else max(2, count)  # never one more than parts of 16
            assert batch.seqlens_k[slot] + 1 == item.start + taken
        packed = spread[batch.attention_places[0, :, 0], batch.attention_places[0, :, 1]]
        np.testing.assert_array_equal(packed, batch.input_ids[0])


def filled(slots: int = 3, capacity: int = 1024) -> KVCache:
    cache = KVCache({"past_key_values.0.key": (2, 16), "past_key_values.0.value": (2, 16)}, slots, capacity)
    for name, buffer in cache.buffers.items():
        buffer[:] = np.random.default_rng(len(name)).standard_normal(buffer.shape)
    return cache


def test_copies_between_slots() -> None:
    cache = filled()
    before = {name: buffer.copy() for name, buffer in cache.buffers.items()}
    cache.copy(source=2, target=0, length=100)
    for name, buffer in cache.buffers.items():
        np.testing.assert_array_equal(buffer[0, :, :100], before[name][2, :, :100])
        np.testing.assert_array_equal(buffer[0, :, 100:], before[name][0, :, 100:])
        np.testing.assert_array_equal(buffer[1:], before[name][1:])


def test_bytes_per_token() -> None:
    assert filled().bytes_per_token == 2 * 2 * 16 * 4


def test_released_positions_are_gone_and_nothing_else() -> None:
    """A page holds 64 positions here, so what is kept ends at a page."""
    cache = filled()
    before = {name: buffer.copy() for name, buffer in cache.buffers.items()}
    cache.release(1, 128)
    for name, buffer in cache.buffers.items():
        np.testing.assert_array_equal(buffer[1, :, :128], before[name][1, :, :128])
        assert not buffer[1, :, 128:].any()
        np.testing.assert_array_equal(buffer[[0, 2]], before[name][[0, 2]])
    cache.release(1)
    assert not any(buffer[1].any() for buffer in cache.buffers.values())
    for name, buffer in cache.buffers.items():
        np.testing.assert_array_equal(buffer[[0, 2]], before[name][[0, 2]])


def test_memory_is_taken_when_it_is_used_and_given_back() -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() // 2**20

    start = resident()
    cache = KVCache({"key": (4, 64)}, slots=8, capacity=16384)  # 128 MiB
    assert resident() - start < 8
    cache.buffers["key"][3] = 1.0
    assert 12 < resident() - start < 24
    cache.release(3, 8192)
    assert 4 < resident() - start < 12
    cache.release(3)
    assert resident() - start < 4


def test_available_memory(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("proc/meminfo", "MemTotal: 4000 kB\nMemAvailable:    3000 kB\n")
    assert memory.available_bytes(tmp_path) == 3000 * 1024
    write("sys/fs/cgroup/memory.max", "max\n")
    write("sys/fs/cgroup/memory.current", "5\n")
    assert memory.available_bytes(tmp_path) == 3000 * 1024
    write("sys/fs/cgroup/memory.max", "1000000\n")
    write("sys/fs/cgroup/memory.current", "400000\n")
    assert memory.available_bytes(tmp_path) == 600_000
    assert memory.available_bytes() > 2**20
