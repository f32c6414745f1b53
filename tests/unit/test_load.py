"""The load benchmark without a server: arrivals, figures, ratios, and answers that are found to be wrong."""

from __future__ import annotations

import asyncio
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load import __main__ as command
from benchmarks.load import arrivals, ratios, report, session, workloads
from benchmarks.load.arrivals import Timed
from benchmarks.load.doors import Answered, AnswerError, FullError, Note
from benchmarks.load.figures import Figures, Limits, Run, summarize
from benchmarks.load.others import from_aiperf
from benchmarks.load.session import Found, Settings
from benchmarks.load.workloads import Generation, Workload

ITEMS = ["a", "b", "c"]


class Clock:
    """A time that passes where something is done."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_closed_arrivals_keep_so_many_requests_running() -> None:
    clock, running, most, asked = Clock(), 0, 0, list[str]()

    async def ask(item: str, note: Note) -> Answered:
        nonlocal running, most
        running += 1
        most = max(most, running)
        asked.append(item)
        await asyncio.sleep(0)
        clock.now += 1.0
        running -= 1
        return Answered(item)

    found = asyncio.run(arrivals.closed(ask, ITEMS, 2, 4.5, first=2, now=clock))
    assert most == 2
    # The sixth ends at second 6; those that begin before 4.5 are the first four, and two run then.
    assert asked == ["c", "a", "b", "c", "a", "b"]
    assert sorted(each.item for each in found) == [0, 0, 1, 1, 2, 2]
    assert all(each.answer == ITEMS[each.item] for each in found)


def test_each_caller_asks_at_least_once() -> None:
    async def ask(item: str, note: Note) -> Answered:
        return Answered(item)

    assert len(asyncio.run(arrivals.closed(ask, ITEMS, 5, 0.0))) == 5


def test_poisson_arrivals() -> None:
    moments = arrivals.moments(100.0, 50.0, seed=3)
    assert moments == arrivals.moments(100.0, 50.0, seed=3) != arrivals.moments(100.0, 50.0, seed=4)
    assert moments == sorted(moments)
    assert moments[0] > 0.0
    assert moments[-1] < 50.0
    assert len(moments) == pytest.approx(5000, abs=4 * 5000**0.5)
    waits = [after - before for before, after in pairwise(moments)]
    assert sum(wait > 0.01 for wait in waits) / len(waits) == pytest.approx(0.368, abs=0.03)  # exp(-1): no memory
    assert len(arrivals.moments(0.001, 0.1, seed=3)) == 1


def test_arrivals_do_not_wait_for_answers() -> None:
    """All are sent although none is answered before the last one came; their waits count from when they were due."""
    sent, every = [], asyncio.Event()
    count = len(arrivals.moments(200.0, 0.1, 0))

    async def ask(item: str, note: Note) -> Answered:
        sent.append(item)
        if len(sent) == count:
            every.set()
        await asyncio.wait_for(every.wait(), 10)
        return Answered(item)

    found = asyncio.run(arrivals.poisson(ask, ITEMS, 200.0, 0.1, first=1))
    assert count > 5
    assert [each.item for each in found] == [(1 + number) % 3 for number in range(count)]
    assert found[0].due < found[-1].due <= found[0].end


def test_what_is_raised_is_told() -> None:
    async def ask(item: str, note: Note) -> Answered:
        note()
        if item == "a":
            raise FullError("no room")
        if item == "b":
            raise AnswerError("status 500")
        return Answered("text", 4)

    full, failed, fine = asyncio.run(arrivals.closed(ask, ITEMS, 3, 0.0))
    assert (full.full, full.error, full.answer) == (True, "", None)
    assert (failed.full, failed.error) == (False, "AnswerError: status 500")
    assert (fine.answer, fine.tokens, len(fine.moments)) == ("text", 4, 1)


RUN = Run("m", "text-generation", "trident", "grpc", 2)
LIMITS = Limits(first_token=1000, inter_token=100, latency=500)


def streamed(item: int, due: float, first: float, last: float, tokens: int, answer: str) -> Timed:
    return Timed(item, due, end=last, moments=[first, last], answer=answer, tokens=tokens)


def test_figures_of_streams() -> None:
    found = [
        streamed(0, 10.0, 10.5, 11.0, 11, "right"),  # 500 ms, 50 ms a token
        streamed(1, 10.0, 11.5, 12.0, 11, "right"),  # too late
        streamed(1, 11.0, 11.5, 14.0, 11, "right"),  # 250 ms a token: too slow
        streamed(0, 12.0, 12.1, 13.0, 11, "other"),  # in time, and wrong
        Timed(0, 12.0, end=12.0, full=True),
        Timed(0, 12.0, end=15.0, error="gone"),
    ]
    figures = summarize(RUN, found, ["right", "right"], LIMITS)
    assert (figures.requests, figures.wrong, figures.full, figures.failed) == (4, 1, 1, 1)
    assert figures.requests_per_second == pytest.approx(4 / 5)
    assert figures.tokens_per_second == pytest.approx(44 / 5)
    assert figures.first_token is not None
    assert figures.inter_token is not None
    assert figures.first_token["p50"] == pytest.approx(500)
    assert figures.inter_token["p50"] == pytest.approx((50 + 90) / 2)
    assert figures.latency["p50"] == pytest.approx((1000 + 2000) / 2)
    assert figures.goodput == pytest.approx(1 / 6)


def test_figures_of_whole_answers() -> None:
    found = [Timed(0, 0.0, end=0.4, answer="x"), Timed(0, 0.0, end=0.6, answer="x")]
    figures = summarize(RUN, found, None, LIMITS)
    assert (figures.wrong, figures.first_token, figures.inter_token, figures.tokens_per_second) == (None,) * 4
    assert figures.goodput == 0.5
    assert figures.requests_per_second == pytest.approx(2 / 0.6)
    assert summarize(RUN, found, None, LIMITS, least=4.0).requests_per_second == 0.5
    assert summarize(RUN, [], None, LIMITS).requests_per_second == 0.0


def figures(run: Run, speed: float) -> Figures:
    return Figures(**vars(run), requests=3, wrong=0, full=0, failed=0, requests_per_second=speed,
                   tokens_per_second=None, latency={}, first_token=None, inter_token=None, goodput=None)  # fmt: skip


def runs(**speeds: list[float]) -> dict[Run, list[Figures]]:
    """By door and streams, as in `grpc_1`."""
    found = {}
    for name, values in speeds.items():
        door, streams = name.split("_")
        run = Run("m", "text-generation", "trident", door, int(streams))
        found[run] = [figures(run, value) for value in values]
    return found


def test_ratios_are_of_one_round() -> None:
    """A slow minute hits both measurements of a round."""
    measured = runs(grpc_1=[10.0, 2.0, 8.0], gateway_1=[9.0, 1.8, 4.0], grpc_8=[40.0, 8.0, 8.0])
    slow = Run("m", "text-generation", "aiperf", "gateway", 1)
    random = Run("m", "text-generation", "trident", "gateway", None, 5.0)
    measured |= {slow: [figures(slow, 1.0)], random: [figures(random, 1.0)]}
    assert ratios.ratios(measured) == {"m": {"gateway/grpc at 1": 0.9, "grpc: 8 at a time/1": 4.0}}


def test_differences() -> None:
    stored = {"m": {"http/grpc at 1": 0.9, "gateway/grpc at 1": 0.8}, "n": {"http/grpc at 1": 1.0}}
    same = {"m": {"http/grpc at 1": 0.98, "gateway/grpc at 1": 0.73}, "n": {"http/grpc at 1": 1.0}}
    assert ratios.differences(stored, same, 0.1) == []
    other = {"m": {"http/grpc at 1": 1.0, "gateway/grpc at 1": 0.71, "grpc: 8 at a time/1": 3.0}}
    assert ratios.differences(stored, other, 0.1) == [
        "m: http/grpc at 1 is 1.00, 0.90 is stored, and the tolerance is 10%",
        "m: gateway/grpc at 1 is 0.71, 0.80 is stored, and the tolerance is 10%",
        "n: http/grpc at 1 was not measured, 1.00 is stored",
        "m: nothing is stored for grpc: 8 at a time/1",
    ]


def check(found: Found, file: Path, *flags: str) -> int:
    options = command.parser().parse_args(["--check", "--ratios", str(file), *flags])
    return command.checked(found, options, command.settings_of(options))


def test_a_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ratios.json"
    found = Found(runs=runs(grpc_1=[10.0], http_1=[8.0]))
    assert check(found, file) == 1
    assert f"{file} does not exist: make load-check UPDATE=1 writes it" in capsys.readouterr().err
    assert check(found, file, "--update") == 0
    assert ratios.load(file).on_this_machine()
    assert ratios.load(file).ratios == {"m": {"http/grpc at 1": 0.8}}
    assert check(Found(runs=runs(grpc_1=[5.0], http_1=[4.1])), file) == 0
    capsys.readouterr()
    slower = Found(runs=runs(grpc_1=[10.0], http_1=[5.0]))
    assert check(slower, file) == 1
    assert "m: http/grpc at 1 is 0.50, 0.80 is stored, and the tolerance is 25%" in capsys.readouterr().err
    assert check(slower, file, "--tolerance", "0.4") == 0
    assert check(slower, file, "--tokens", "7") == 1
    assert "of 32 tokens, not of 7" in capsys.readouterr().err
    # A flag that leaves a ratio out leaves it out of the comparison; without one it is missed.
    fewer = Found(runs=runs(grpc_1=[10.0], http_1=[8.0], grpc_4=[20.0]))
    assert check(fewer, file, "--doors", "grpc") == 1
    assert "nothing is stored for grpc: 4 at a time/1" in capsys.readouterr().err
    alone = Found(runs=runs(grpc_1=[10.0]))
    assert check(alone, file) == 1
    assert check(alone, file, "--doors", "grpc") == 0
    file.write_text(file.read_text().replace(ratios.processor(), "a slow one"))
    capsys.readouterr()
    assert check(found, file) == 0
    assert f"those of another machine: a slow one, {os.cpu_count()} cores" in capsys.readouterr().err
    file.write_text('{"speed": 1}')
    assert check(found, file) == 1
    assert "unexpected keyword argument 'speed'" in capsys.readouterr().err
    assert check(Found(runs=found.runs, faults=["wrong"]), file, "--update") == 1
    assert json.loads(file.read_text()) == {"speed": 1}


class OneDoor:
    """Answers with the prompt in capitals, except where it is told not to."""

    def __init__(self, name: str, wrong: str = "", broken: str = "", opens: bool = True) -> None:
        self.name = name
        self._wrong, self._broken, self._opens = wrong, broken, opens

    def opens(self, workload: Workload | Generation) -> bool:
        return self._opens

    async def ask(self, model: str, workload: Workload | Generation, item: Any, note: Note) -> Answered:
        await asyncio.sleep(0)
        note()
        if item == self._broken:
            raise AnswerError("status 500")
        return Answered("nonsense" if item == self._wrong else item.upper(), 4)


def test_a_session_finds_wrong_answers(capsys: pytest.CaptureFixture[str]) -> None:
    second, third = workloads.prompts(2, 2)[1:3]
    doors = [
        OneDoor("grpc"),
        OneDoor("http", wrong=second),
        OneDoor("gateway", broken=third),
        OneDoor("x", opens=False),
    ]
    found, said = Found(), list[str]()
    settings = Settings(seconds=0.05, streams=(1, 2), rounds=2, tokens=4)
    parameters = {"task": "text-generation", "slots": "2"}
    asyncio.run(session.measure("m", parameters, OneDoor("alone"), doors, settings, found, said.append))
    shown = [(run.door, run.streams) for run in found.runs]
    assert shown[:6] == [(door, streams) for streams in (1, 2) for door in ("grpc", "http", "gateway")]
    assert [each[1] for each in shown[6:]] == [None] * 3
    assert [len(each) for each in found.runs.values()] == [2] * 6 + [1] * 3
    assert all("over http" in each or "over gateway" in each for each in found.faults)
    wrong = next(each for each in found.faults if "1 at a time" in each and "http" in each)
    assert "answers are not those of a lone request" in wrong
    assert "'nonsense', expected '1: " in wrong
    assert any("requests failed: AnswerError: status 500" in each for each in found.faults)
    assert found.left_out == ["m over x: there is no endpoint for text-generation"]
    text = report.as_markdown(found, settings, report.Machine("a chip", 2, 0.0))
    assert "## Faults" in text
    assert "| m | gateway/grpc at 1 |" in text


def test_a_model_that_refuses_all_requests_is_left_out() -> None:
    class Refusing(OneDoor):
        async def ask(self, model: str, workload: Workload | Generation, item: Any, note: Note) -> Answered:
            raise AnswerError("name a language")

    found = Found()
    for task in ("translation", "speech-recognition"):
        asyncio.run(session.measure("m", {"task": task}, Refusing("grpc"), [], Settings(), found, print))
    assert found.left_out == [
        "m (translation): AnswerError: name a language",
        "m (speech-recognition): no requests are known for this task",
    ]
    assert not found.runs


def test_prompts_do_not_repeat_while_a_slot_holds_them() -> None:
    (workload,) = workloads.candidates("text-generation", {"slots": "4"}, 3, 8)
    assert len({item[:3] for item in workload.items}) == len(workload.items) == 7
    assert isinstance(workload, Generation)
    assert workload.options() == {"max_tokens": 8, "ignore_eos": True, "temperature": 1.0, "top_k": 1}


def test_rounds_are_joined() -> None:
    rounds = [figures(RUN, speed) for speed in (1.0, 5.0, 2.0)]
    joined = report.median(rounds)
    assert (joined.requests, joined.requests_per_second) == (9, 2.0)


def test_aiperfs_export() -> None:
    """As version 0.13.0 writes it; the request of an embedder has no first token."""
    spread = {"avg": 2.0, "p50": 1.0, "p90": 2.0, "p99": 3.0}
    exported = {"request_count": {"avg": 8.0}, "error_request_count": {"avg": 2.0}, "request_latency": spread}
    exported |= {"request_throughput": {"avg": 4.0}, "good_request_count": {"avg": 5.0}, "time_to_first_token": spread}
    found = from_aiperf(RUN, exported)
    assert (found.requests, found.failed, found.wrong, found.requests_per_second) == (8, 2, None, 4.0)
    assert found.latency == found.first_token == {"p50": 1.0, "p90": 2.0, "p99": 3.0}
    assert (found.inter_token, found.tokens_per_second, found.goodput) == (None, None, 0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--streams", "0"], "0 must be whole numbers above 0"),
        (["--seconds", "0"], "0 must be above 0"),
        (["--rate", "-1"], "-1 must not be below 0"),
    ],
)
def test_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(flags)
    assert message in capsys.readouterr().err


def test_what_flags_mean() -> None:
    flags = ["--seconds", "2", "--streams", "4,1", "--rate", "0", "--first-token-ms", "7"]
    settings = command.settings_of(command.parser().parse_args(flags))
    assert (settings.seconds, settings.streams, settings.rates, settings.rounds) == (2.0, [1, 4], [], 1)
    assert settings.limits == Limits(first_token=7.0)
    checked = command.settings_of(command.parser().parse_args(["--check", "--rate", "3"]))
    assert (checked.streams, checked.rates, checked.rounds) == ((1, 16), [3.0], 5)
