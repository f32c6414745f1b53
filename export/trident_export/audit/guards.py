"""What a guard finds of what it should find, and what it takes for that: `trident-export audit-guard`."""

from __future__ import annotations

import asyncio
import json
import math
import time
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trident_export.errors import TextError
from trident_serving.errors import ServingError
from trident_serving.guard.asking import Models
from trident_serving.guard.filtering import Findings, TextFilter
from trident_serving.guard.rules import Guard, Stage

BUILT_IN = Path(__file__).with_name("guard_cases.toml")
SECONDS = 600.0  # for all texts of one kind
_Z = 1.959964  # 95 %


@dataclass(frozen=True)
class Kind:
    """Texts of one kind: those that a guard should find something in, and harmless ones that look alike."""

    name: str
    flagged: tuple[str, ...]
    harmless: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """What a guard made of one kind of texts.

    Attributes:
        found: how many of the flagged texts a rule found something in.
        flagged, harmless: how many there are.
        false: how many harmless texts a rule found something in.
        missed: the flagged texts that passed.
        mistaken: the harmless texts that did not.
    """

    kind: str
    found: int
    flagged: int
    false: int
    harmless: int
    missed: tuple[str, ...]
    mistaken: tuple[str, ...]


@dataclass(frozen=True)
class GuardAudit:
    """What was found, by kind, and by rule: in how many flagged and harmless texts."""

    guard: str
    stage: str
    kinds: Sequence[Measured]
    rules: Mapping[str, tuple[int, int]]


def load(path: Path = BUILT_IN) -> list[Kind]:
    """Read a file of texts: a table for each kind, with `flagged` and `harmless`.

    Raises:
        TextError: it can't be read, or lacks something; the message says what.
    """
    try:
        found = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise TextError(f"{path} can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TextError(f"{path} is no TOML in UTF-8: {error}") from error
    kinds = []
    for name, table in found.items():
        lists = [table.get(key) if isinstance(table, dict) else None for key in ("flagged", "harmless")]
        for each in lists:
            if not isinstance(each, list) or not each or not all(isinstance(text, str) and text for text in each):
                raise TextError(f"{path}: {name} must be a table of flagged and harmless, each a list of texts")
        kinds.append(Kind(name, *(tuple(each) for each in lists if each)))
    if not kinds:
        raise TextError(f"{path} has no texts")
    return kinds


def measure(guard: Guard, kinds: Sequence[Kind], stage: Stage, address: str) -> GuardAudit:
    """Send every text through a guard's rules.

    Args:
        stage: whose rules read the texts.
        address: of the server with the models that rules ask; "" where none does.

    Raises:
        TextError: a rule's model can't be asked.
    """
    try:
        return asyncio.run(_measure(guard, kinds, stage, address))
    except ServingError as error:
        raise TextError(f"the server says: {error}") from error


async def _measure(guard: Guard, kinds: Sequence[Kind], stage: Stage, address: str) -> GuardAudit:
    models = Models.of_server(guard, "", address)
    rules: dict[str, Counter[bool]] = {rule.name: Counter() for rule in guard.of(stage)}
    measured = []
    try:
        for kind in kinds:
            asked = models.about(time.monotonic() + SECONDS)
            passed: dict[bool, list[str]] = {True: [], False: []}
            stopped: dict[bool, list[str]] = {True: [], False: []}
            for harmful, texts in ((True, kind.flagged), (False, kind.harmless)):
                for text in texts:
                    findings = Findings()
                    for rule in guard.of(stage):  # each by itself: a rule that blocks hides what others find
                        before = findings.told()
                        await TextFilter([rule], stage, findings, asked).push(text, end=True)
                        rules[rule.name][harmful] += findings.told() != before
                    (stopped if findings.told() else passed)[harmful].append(text)
            measured.append(
                Measured(
                    kind.name,
                    len(stopped[True]),
                    len(kind.flagged),
                    len(stopped[False]),
                    len(kind.harmless),
                    tuple(passed[True]),
                    tuple(stopped[False]),
                )
            )
    finally:
        await models.close()
    return GuardAudit(
        guard.name, stage.value, measured, {name: (hits[True], hits[False]) for name, hits in rules.items()}
    )


def interval(count: int, of: int) -> tuple[float, float]:
    """Wilson's interval of 95 % of a share."""
    share, square = count / of, _Z**2 / of
    middle = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / of + square / (4 * of)) / (1 + square)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def as_table(found: GuardAudit) -> str:
    """Markdown: shares by kind, hits by rule, and the texts that were judged wrongly."""
    lines = [
        f"## Guard {found.guard}, as {found.stage}",
        "",
        "| kind | found | false alarms |",
        "|---|---:|---:|",
    ]
    for each in found.kinds:
        lines.append(f"| {each.kind} | {_share(each.found, each.flagged)} | {_share(each.false, each.harmless)} |")
    lines += ["", "| rule | hits in flagged texts | in harmless ones |", "|---|---:|---:|"]
    lines += [f"| {name} | {flagged} | {harmless} |" for name, (flagged, harmless) in found.rules.items()]
    for title, field in (("Missed", "missed"), ("False alarms", "mistaken")):
        texts = [f"- {each.kind}: `{' '.join(text.split())}`" for each in found.kinds for text in getattr(each, field)]
        if texts:
            lines += ["", f"{title}:", "", *texts]
    return "\n".join(lines) + "\n"


def _share(count: int, of: int) -> str:
    low, high = interval(count, of)
    return f"{count} of {of} [{low:.2f}, {high:.2f}]"


def write(found: GuardAudit, folder: Path) -> str:
    """Write guard.json and guard.md into a folder; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    table = as_table(found)
    (folder / "guard.json").write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    (folder / "guard.md").write_text(table, encoding="utf-8")
    return table
