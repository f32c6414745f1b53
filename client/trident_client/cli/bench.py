"""`trident bench`: what a server does now for one model, in some seconds.

It asks what nobody has asked before, so that no prefix is reused, without drafts, and with answers of equal length;
then it asks some of it again and compares the answers.
"""

from __future__ import annotations

import argparse
import contextlib
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trident_client import Client, NotFoundError
from trident_client.cli import connection, exits, output
from trident_client.cli.connection import number
from trident_client.cli.exits import Exit, InputError

_GENERATION = "text-generation"
_STORY = (
    "the river runs past a mill and an old bridge where people meet in the evening and talk about the weather the "
    "harvest and the news from the town over the hill before they walk home along the road under tall trees"
)
_TOLERANCE = 1e-3  # between numbers of one text in batches of different shapes
_BATCH = 32


@dataclass(frozen=True)
class Round:
    """What one round gave; None where it doesn't apply.

    Attributes:
        name: what it did.
        callers: at a time.
        seconds: it took.
        requests: that were answered.
        tokens_per_second: generated.
        texts_per_second: answered.
        first_token_p50, first_token_p99: seconds until a token came.
        inter_token_p50, inter_token_p99: seconds between two tokens, as the caller sees them.
        request_p50, request_p99: seconds of a whole answer.
    """

    name: str
    callers: int
    seconds: float
    requests: int
    tokens_per_second: float | None = None
    texts_per_second: float | None = None
    first_token_p50: float | None = None
    first_token_p99: float | None = None
    inter_token_p50: float | None = None
    inter_token_p99: float | None = None
    request_p50: float | None = None
    request_p99: float | None = None


@dataclass
class Report:
    """What a run found.

    Attributes:
        compared, equal: answers that were asked for again, and those that came out the same.
    """

    model: str
    task: str
    rounds: list[Round] = field(default_factory=list)
    compared: int = 0
    equal: int = 0


def add(command: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    command.add_argument("address", nargs="?", metavar="URL", help="of the server, as --url takes it")
    command.add_argument("--model", help="default: the server's only generator, or its only model")
    command.add_argument("--streams", type=number(2), default=8, help="callers of the second round (default 8)")
    command.add_argument(
        "--seconds", type=connection.seconds, default=15.0, help="that the rounds take together (default 15)"
    )
    command.add_argument("--prompt-words", type=number(1), default=60, metavar="N", help="of a text (default 60)")
    command.add_argument("--max-tokens", type=number(2), default=64, metavar="N", help="of an answer (default 64)")
    command.add_argument("--drafts", action="store_true", help="allow drafts, which speed up answers that repeat words")
    output.add(command)


def run(options: argparse.Namespace) -> int:
    """Measure, and print what was found."""
    if options.address:
        options.urls = [options.address]
    with connection.client(options) as client:
        model = options.model or _model(client)
        task = client.parameters(model).get("task", "")
        report = Report(model, task)
        if task == _GENERATION:
            _generator(client, options, report)
        elif task in READERS:
            _reader(client, options, report)
        else:
            raise InputError(f"{model} has the task {task or 'none'}; bench knows {', '.join((_GENERATION, *READERS))}")
    if options.json:
        output.document(report)
    else:
        _print(report)
    if report.equal < report.compared:
        exits.say(f"{report.compared - report.equal} of {report.compared} answers were not the same again")
        return Exit.FAILED
    return Exit.DONE


def _model(client: Client) -> str:
    try:
        return client._model(None, _GENERATION, None)
    except NotFoundError:
        public = [name for name in client.served() if "_" not in name]
        if len(public) != 1:
            raise InputError(f"name one with --model: the server has {', '.join(public) or 'no model'}") from None
        return public[0]


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        exits.say(text)


# Generators


@dataclass
class _Answer:
    """An answer as it came: the time of each response and the tokens so far, and its text once it is whole."""

    began: float
    times: list[tuple[float, int]] = field(default_factory=list)
    text: str | None = None

    def gaps(self) -> list[float]:
        """Seconds between tokens; those that came together share the wait for them."""
        found: list[float] = []
        for (before, fewer), (now, more) in zip(self.times, self.times[1:], strict=False):
            found += [(now - before) / (more - fewer)] * (more - fewer) if more > fewer else []
        return found


def _generator(client: Client, options: argparse.Namespace, report: Report) -> None:
    asked: dict[str, Any] = {"model": report.model, "temperature": 0.0, "ignore_eos": True}
    asked |= {} if options.drafts else {"prompt_lookup": False}
    run_id = secrets.token_hex(4)

    def prompt(index: int) -> str:
        return f"{run_id} {index}: " + _text(index, options.prompt_words)

    def answer(text: str, tokens: int, until: float | None = None) -> _Answer:
        found = _Answer(time.monotonic())
        parts = []
        with contextlib.closing(client.stream(text, max_tokens=tokens, min_tokens=tokens, **asked)) as stream:
            for chunk in stream:
                found.times.append((time.monotonic(), chunk.num_output_tokens))
                parts.append(chunk.text)
                if chunk.finish_reason:
                    found.text = "".join(parts)
                elif until is not None and found.times[-1][0] > until:
                    break
        return found

    _progress("warming up")
    began = time.monotonic()
    answer(prompt(-1), 8)
    speed = 8 / (time.monotonic() - began)
    tokens = max(2, min(options.max_tokens, int(speed * options.seconds * 0.15)))
    firsts: dict[str, _Answer] = {}

    def measured(name: str, callers: int, seconds: float, whole: int, texts: Callable[[int], str | None]) -> None:
        """A round; its first `whole` answers are waited for, the others are left when the time is over."""
        _progress(f"{name}, {seconds:.0f} s")
        started, until = time.monotonic(), time.monotonic() + seconds
        answers: list[_Answer] = []

        def ask(index: int) -> bool:
            text = texts(index)
            if text is None:
                return False
            found = answer(text, tokens, None if index < whole else until)
            answers.append(found)
            if found.text is not None:
                before = firsts.setdefault(text, found)
                if before is not found:
                    report.compared += 1
                    report.equal += before.text == found.text
            return True

        _together(callers, until, ask, whole)
        report.rounds.append(_generator_round(name, callers, time.monotonic() - started, answers))

    streams = options.streams
    measured("1 stream", 1, options.seconds * 0.3, 1, prompt)
    again = list(firsts)[:streams]
    measured(f"{streams} streams", streams, options.seconds * 0.45, 0, lambda index: prompt(1000 + index))
    measured(
        "the first again",
        streams,
        options.seconds * 0.25,
        len(again),
        lambda index: again[index] if index < len(again) else None,
    )


def _generator_round(name: str, callers: int, seconds: float, answers: Sequence[_Answer]) -> Round:
    firsts = [answer.times[0][0] - answer.began for answer in answers if answer.times]
    gaps = [gap for answer in answers for gap in answer.gaps()]
    whole = [answer.times[-1][0] - answer.began for answer in answers if answer.text is not None]
    return Round(
        name=name,
        callers=callers,
        seconds=seconds,
        requests=len(whole),
        tokens_per_second=sum(answer.times[-1][1] for answer in answers if answer.times) / seconds,
        first_token_p50=_quantile(firsts, 50),
        first_token_p99=_quantile(firsts, 99),
        inter_token_p50=_quantile(gaps, 50),
        inter_token_p99=_quantile(gaps, 99),
        request_p50=_quantile(whole, 50),
        request_p99=_quantile(whole, 99),
    )


# Models that answer a text at once


READERS: dict[str, Callable[[Client, str, list[str]], Sequence[Any]]] = {
    "feature-extraction": lambda client, model, texts: list(client.embed(texts, model=model)),
    "sparse-embedding": lambda client, model, texts: client.embed_sparse(texts, model=model),
    "text-classification": lambda client, model, texts: client.classify(texts, model=model),
    "token-classification": lambda client, model, texts: client.entities(texts, model=model),
    "zero-shot-classification": lambda client, model, texts: client.classify_zero_shot(
        texts, ["a river", "a machine"], model=model
    ),
    "question-answering": lambda client, model, texts: client.answer(
        ["Where do people meet?"] * len(texts), texts, model=model
    ),
    "text-ranking": lambda client, model, texts: [
        ranked.score for ranked in sorted(client.rank("a bridge", texts, model=model), key=lambda ranked: ranked.index)
    ],
    "translation": lambda client, model, texts: [
        answer.text for answer in client.translate(texts, model=model, max_tokens=32)
    ],
    "summarization": lambda client, model, texts: [
        answer.text for answer in client.summarize(texts, model=model, max_tokens=32)
    ],
}


def _reader(client: Client, options: argparse.Namespace, report: Report) -> None:
    call = READERS[report.task]
    texts = [_text(index, options.prompt_words) for index in range(256)]
    firsts: dict[str, Any] = {}
    lock = threading.Lock()

    def measured(name: str, callers: int, size: int, seconds: float) -> None:
        _progress(f"{name}, {seconds:.0f} s")
        started, until = time.monotonic(), time.monotonic() + seconds
        took: list[float] = []

        def ask(index: int) -> bool:
            part = [texts[(index * size + offset) % len(texts)] for offset in range(size)]
            began = time.monotonic()
            found = call(client, report.model, part)
            ended = time.monotonic()
            with lock:
                took.append(ended - began)
                for text, answer in zip(part, found, strict=True):
                    plain = output.plain(answer)
                    if text in firsts:
                        report.compared += 1
                        report.equal += same(firsts[text], plain)
                    else:
                        firsts[text] = plain
            return True

        _together(callers, until, ask)
        elapsed = time.monotonic() - started
        report.rounds.append(
            Round(
                name=name,
                callers=callers,
                seconds=elapsed,
                requests=len(took),
                texts_per_second=len(took) * size / elapsed,
                request_p50=_quantile(took, 50),
                request_p99=_quantile(took, 99),
            )
        )

    call(client, report.model, texts[:1])
    measured("1 caller", 1, 1, options.seconds / 3)
    measured(f"{options.streams} callers", options.streams, 1, options.seconds / 3)
    if report.task not in ("translation", "summarization"):
        measured(f"requests of {_BATCH} texts", 2, _BATCH, options.seconds / 3)


def same(one: Any, other: Any) -> bool:
    """Whether two answers are equal, numbers within a thousandth."""
    if isinstance(one, float | int) and isinstance(other, float | int):
        return abs(one - other) <= _TOLERANCE * max(1.0, abs(one))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return bool(one == other)


# Both


def _text(index: int, words: int) -> str:
    """A text of so many words that no other index has."""
    story = _STORY.split()
    start, step = index * 7 % len(story), 1 + index % 5
    chosen = [story[(start + position * step) % len(story)] for position in range(words)]
    return " ".join([f"Note {index}", *chosen])


def _together(callers: int, until: float, ask: Callable[[int], bool], least: int = 0) -> None:
    """Have threads ask one thing after the other until the time is over, or there is nothing more to ask.

    Args:
        least: things that are asked even when the time is over.

    Raises:
        TridentError: the first that a call raised.
    """
    count, lock = 0, threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        nonlocal count
        while not errors and (time.monotonic() < until or count < least):
            with lock:
                index, count = count, count + 1
            try:
                if not ask(index):
                    return
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)
    if errors:
        raise errors[0]


def _quantile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


def _print(report: Report) -> None:
    print(f"{report.model} ({report.task})")
    generator = report.task == _GENERATION
    names = ["round", "requests"]
    names += ["tokens/s", "first token p50", "p99", "next token p50", "p99"] if generator else ["texts/s"]
    table = [[*names, "request p50", "p99"]]
    for each in report.rounds:
        row = [each.name, str(each.requests)]
        if generator:
            row.append(f"{each.tokens_per_second:.1f}")
            row += map(_ms, (each.first_token_p50, each.first_token_p99, each.inter_token_p50, each.inter_token_p99))
        else:
            row.append(f"{each.texts_per_second:.1f}")
        table.append([*row, _ms(each.request_p50), _ms(each.request_p99)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
    print(f"{report.equal} of {report.compared} answers were the same when they were asked for again")


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value * 1000:.1f} ms"
