"""What a soak concludes from what it has seen."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.soak import answers, hostile, refusals, report, verdict, watch, workers
from benchmarks.soak.answers import Case
from benchmarks.soak.refusals import Refusal, Reply
from benchmarks.soak.session import Outcome
from benchmarks.soak.watch import Series, Watch
from benchmarks.soak.workers import Entry

MIB = 2**20
MINUTES = 15
TIMES = [2.0 * number for number in range(30 * MINUTES)]


def _noise(seed: int) -> Callable[[], float]:
    source = random.Random(seed)
    return lambda: source.gauss(0, 2 * MIB)


def test_a_leak_is_not_flat() -> None:
    """One mebibyte a minute, within noise of twice as much."""
    noise = _noise(1)
    found = verdict.fit(TIMES, [300 * MIB + moment / 60 * MIB + noise() for moment in TIMES], "memory")
    assert found is not None
    assert not found.flat
    assert found.slope_per_hour == pytest.approx(60 * MIB, rel=0.15)
    assert found.rise == pytest.approx(10 * MIB, rel=0.15)
    assert found.limit == 8 * MIB


def test_a_plateau_is_flat() -> None:
    """Memory that is taken during the first third, with noise and bursts afterwards, the last ones at the end."""
    noise = _noise(2)
    values = [300 * MIB + min(moment / 250, 1) * 500 * MIB + noise() for moment in TIMES]
    for number in range(len(values)):
        if number % 40 > 35:
            values[number] += 200 * MIB
    found = verdict.fit(TIMES, values, "memory")
    assert found is not None
    assert found.flat
    assert abs(found.rise) < 2 * MIB
    assert found.level == pytest.approx(800 * MIB, rel=0.01)


def test_a_step_every_minute_is_not_flat() -> None:
    found = verdict.fit(TIMES, [20.0 + moment // 60 for moment in TIMES], "threads")
    assert found is not None
    assert not found.flat
    assert found.rise == pytest.approx(10, abs=0.5)


def test_a_large_process_may_move_more() -> None:
    found = verdict.fit(TIMES, [4096 * MIB + moment / 60 * MIB for moment in TIMES], "memory")
    assert found is not None
    assert found.limit == pytest.approx(0.005 * 4096 * MIB, rel=0.01)
    assert found.flat


def test_too_short_to_tell() -> None:
    assert verdict.fit([], [], "memory") is None
    assert verdict.fit([0, 2, 4, 6], [1, 2, 3, 4], "memory") is None


EMBEDDING = Case("e", "minilm", {"text_input": ["a"]}, ("embedding",), 1e-5, rows=True)
TEXT = Case("t", "smollm2", {"text_input": "a"}, ("text_output", "output_log_probs"))


@pytest.mark.parametrize(
    ("case", "expected", "found", "wrong"),
    [
        (EMBEDDING, {"embedding": [0.5, 0.5]}, {"embedding": [0.5, 0.500009]}, ""),
        (EMBEDDING, {"embedding": [0.5, 0.5]}, {"embedding": [0.5, 0.50002]}, "embedding differs by 2e-05"),
        (EMBEDDING, {"embedding": [0.5, 0.5]}, {"embedding": [0.5, math.nan]}, "embedding differs by nan"),
        (EMBEDDING, {"embedding": [0.5, 0.5]}, {"embedding": [0.5]}, "embedding has 1 values, expected 2"),
        (EMBEDDING, {"embedding": [0.5, 0.5]}, {}, "embedding is missing"),
        (
            TEXT,
            {"text_output": ["a"], "output_log_probs": [-0.5]},
            {"text_output": ["a"], "output_log_probs": [-0.5]},
            "",
        ),
        (
            TEXT,
            {"text_output": ["a"], "output_log_probs": [-0.5]},
            {"text_output": ["a"], "output_log_probs": [-0.50000001]},
            "output_log_probs is -0.50000001, expected -0.5",
        ),
        (TEXT, {"text_output": ["a"]}, {"text_output": ["b"]}, "text_output is 'b', expected 'a'"),
    ],
)
def test_answers_are_compared(case: Case, expected: answers.Answer, found: answers.Answer, wrong: str) -> None:
    assert answers.difference(case, expected, found).startswith(wrong)
    assert bool(answers.difference(case, expected, found)) == bool(wrong)


def test_chunks_are_joined() -> None:
    chunks = [
        {"text_output": ["a"], "finish_reason": [""], "output_log_probs": [-1.0]},
        {"text_output": [" b"], "finish_reason": ["stop"], "output_log_probs": [-2.0, -3.0]},
    ]
    assert answers.join(chunks) == {
        "text_output": ["a b"],
        "finish_reason": ["stop"],
        "output_log_probs": [-1.0, -2.0, -3.0],
    }
    assert answers.join([]) == {}


REFUSAL = Refusal("x", lambda address: Reply("", ""), ("HTTP 400",))


@pytest.mark.parametrize(
    ("reply", "wrong"),
    [
        (Reply("HTTP 400", "max_tokens must be at least 1"), ""),
        (Reply("HTTP 500", "Unable to parse 'data': attempt to access JSON"), ""),  # tritonserver's own
        (Reply("HTTP 500", "ValueError: bad"), "expected HTTP 400, found HTTP 500"),
        (Reply(refusals.ANSWERED, "{}"), "expected HTTP 400, found answered"),
        (Reply("HTTP 400", ""), "no sentence"),
        (Reply("HTTP 400", "INTERNAL: something went wrong"), "the message looks like a defect"),
    ],
)
def test_replies_to_bad_requests(reply: Reply, wrong: str) -> None:
    assert refusals.complaint(REFUSAL, reply).startswith(wrong)
    assert bool(refusals.complaint(REFUSAL, reply)) == bool(wrong)


def test_every_bad_request_has_a_name_of_its_own() -> None:
    names = [refusal.name for refusal in refusals.build() + hostile.build()]
    assert len(names) == len(set(names)) > 100


def _outcome(entries: list[Entry], **more: object) -> Outcome:
    watch = Watch.__new__(Watch)
    watch.series = {"minilm_model": [_series(7, lambda moment: 300 * MIB)]}
    watch.shared = (TIMES, [MIB] * len(TIMES))
    outcome = Outcome(900.0, entries, watch, ["smollm2_int4"], {}, [], stop_seconds=1.0, stop_status=0)
    for name, value in more.items():
        setattr(outcome, name, value)
    return outcome


def _series(pid: int, memory: Callable[[float], float]) -> Series:
    many = len(TIMES)
    return Series(pid, TIMES, [memory(moment) for moment in TIMES], [9.0] * many, [9.0] * many)


GOOD = Entry("smollm2 by gRPC stream", "good", "", 1.0, 0.5)


def test_nothing_is_found_in_a_good_run() -> None:
    outcome = _outcome(
        [GOOD, Entry("smollm2_int4 by HTTP", "good", "", 1, 1), Entry("smollm2_int4 by HTTP", "away", "", 1, 1)]
    )
    assert report.findings(outcome) == []
    assert "**Nothing was found.**" in report.as_markdown(outcome)


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"left": {"trident_slots_used of smollm2": 1.0}}, "trident_slots_used of smollm2 is 1 at the end"),
        ({"mended": ["trident: the backend process of minilm has died"]}, "the launcher says: trident: the backend"),
        ({"failed_workers": ["streams ended with status 1"]}, "traffic failed: streams ended"),
        ({"stop_status": 1}, "the launcher ended with status 1"),
        ({"stop_seconds": 9.0}, "the stop took 9.0 s"),
    ],
)
def test_what_is_left_or_had_to_be_mended_is_found(more: dict[str, object], found: str) -> None:
    (line,) = report.findings(_outcome([GOOD], **more))
    assert line.startswith(found)


@pytest.mark.parametrize("outcome", ["error", "wrong", "unexpected"])
def test_calls_that_went_wrong_are_found(outcome: str) -> None:
    (line,) = report.findings(_outcome([GOOD, Entry(GOOD.kind, outcome, "why", 1.0, 0.5)]))
    assert "1 times, smollm2 by gRPC stream: why (1)" in line


def test_processes_that_leak_or_were_replaced_are_found() -> None:
    outcome = _outcome([GOOD])
    outcome.watch.series["smollm2"] = [_series(8, lambda moment: 300 * MIB + moment / 30 * MIB)]
    (line,) = report.findings(outcome)
    assert line.startswith("memory of smollm2 rises by ")
    assert report.findings(outcome, short=True) == []
    outcome.seconds = 240.0
    assert report.findings(outcome) == []
    outcome.watch.series["smollm2"] = [_series(8, lambda moment: MIB), _series(9, lambda moment: MIB)]
    outcome.watch.series["smollm2_int4"] = [_series(10, lambda moment: MIB), _series(11, lambda moment: MIB)]
    assert report.findings(outcome) == ["restarted: smollm2: 2 processes"]


def test_a_kind_that_never_succeeded_is_found() -> None:
    away = Entry("smollm2_int4 by HTTP", "away", "", 1.0, 0.5)
    assert report.findings(_outcome([GOOD, away]), short=True) == []
    assert report.findings(_outcome([GOOD, away])) == ["nothing was verified of: smollm2_int4 by HTTP"]
    assert report.findings(_outcome([])) == ["nothing was verified of: any kind of traffic"]


def test_half_a_line_of_a_journal_is_left_out(tmp_path: Path) -> None:
    journal = workers.Journal(tmp_path / "journal")
    journal.note("kind", 0.0, "good")
    journal.close()
    with (tmp_path / "journal").open("a") as file:
        file.write('{"kind": "ki')
    (entry,) = workers.read(tmp_path / "journal")
    assert (entry.kind, entry.outcome) == ("kind", "good")


def test_what_a_cache_holds_is_no_leak_and_a_new_mapping_is_one() -> None:
    def mapping(size: int, anonymous: int, name: str = "") -> str:
        return (
            f"7f0000000000-7f0000001000 rw-p 00000000 00:00 0 {name}\nSize: {size:>15} kB\nRss: {anonymous:>16} kB\n"
            f"Anonymous: {anonymous:>10} kB\nVmFlags: rd wr mr mw me ac sd\n"
        )

    heap, cache = mapping(60_000, 40_000, "[heap]"), 51_200
    before = watch.memory_of(heap + mapping(cache, 1_000) + mapping(4_000, 300))
    assert before == (40_000 + cache + 300) * 1024
    assert watch.memory_of(heap + mapping(cache, 30_000) + mapping(4_000, 300)) == before
    assert watch.memory_of(heap + mapping(cache, 1_000) + mapping(4_000, 3_300)) == before + 3_000 * 1024
    assert watch.memory_of(heap + mapping(cache, 1_000) * 2 + mapping(4_000, 300)) == before + cache * 1024
    assert watch.memory_of(Path("/proc/self/smaps").read_text()) > 2**23
