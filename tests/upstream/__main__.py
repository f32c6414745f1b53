"""python -m tests.upstream CHECKOUT... [--suite NAME]... [--write docs/reference/upstream-tests.md]

Prints a line for each test and ends with status 1 if one fails that is not known to, or passes though it is known to
fail. CHECKOUT is one of triton-inference-server/server, which is not fetched; each file is taken from the first
that has it. Packages that the tests import are installed into an environment of their own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.clients import environments
from tests.upstream import runner
from tests.upstream.runner import FAILED, LEFT, PASSED, Outcome
from tests.upstream.suites import FUZZ_CASES, NOT_RUN, SUITES

INTRODUCTION = """\
# Triton's own tests

<!-- Written by `make upstream CHECKOUT=folder WRITE=1`. -->

`make upstream CHECKOUT=folder` runs tests of Triton's repository (triton-inference-server/server, folder qa) against
servers that our launcher starts, with its flags and its admin key. It takes a checkout that you have and fetches none;
none of Triton's code is in this repository.

This page is of {version}. Copies of the tests are changed mechanically: the ports; in fuzztest.py the number of cases
({cases} of each URL); in client_non_infer_timeout_test.py the time for a load (20 s in place of 5); in
test_openai_client.py two runs' numbers of chunks are not compared. Models have the names and tensors of Triton's:
those of the checkout as they are; generated ones, which no checkout has, as ONNX graphs that our stand-in for the
ONNX Runtime backend serves; models of Triton's backend `identity` as a Python model. Where tests manage models or
shared memory, their clients send the admin key. Tests of Triton's OpenAI frontend (python/openai), which older
checkouts do not have, ask our gateway for SmolLM2.

| tests | passed | failed | not applicable |
|---|---:|---:|---:|"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.upstream", description=__doc__)
    parser.add_argument("checkouts", nargs="*", help="checkouts of triton-inference-server/server")
    parser.add_argument("--suite", action="append", default=[], help="run suites whose name contains this (repeatable)")
    parser.add_argument(
        "--python", type=Path, default=Path(sys.executable), help="interpreter with the tests' packages"
    )
    parser.add_argument("--logs", type=Path, help="folder to keep the logs in")
    parser.add_argument("--write", type=Path, help="write the list as Markdown")
    given = parser.parse_args(arguments)
    given.checkouts = runner.checkouts(given.checkouts)
    if given.suite and given.write:
        parser.error("--write writes the page of all suites, --suite runs some")
    if not given.checkouts:
        print("no checkout of triton-inference-server/server was given, and none is fetched: nothing was run")
        return 0
    if wrong := [str(each) for each in given.checkouts if not (each / "qa").is_dir()]:
        print(f"{wrong[0]} is no checkout of triton-inference-server/server: nothing was run", file=sys.stderr)
        return 2
    python = environments.environment("upstream") / "python"
    found: list[Outcome] = []
    not_run: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="trident-upstream-") as temporary:
        for number, suite in enumerate(SUITES):
            if given.suite and not any(part in suite.name for part in given.suite):
                continue
            checkout = runner.source(suite, given.checkouts)
            if checkout is None:
                not_run[suite.name] = "no checkout has it"
                continue
            folder = (given.logs or Path(temporary)).resolve() / f"{number:02}"
            try:
                outcomes = runner.run(suite, checkout, folder, python)
            except FileNotFoundError as error:
                not_run[suite.name] = str(error)
                continue
            for outcome in outcomes:
                found.append(outcome)
                print(f"{outcome.suite:58} {outcome.test:74} {outcome.result:15}{outcome.known or outcome.why}")
    for name, why in not_run.items():
        print(f"{name:58} {'':74} {'not run':15}{why}")
    if not found:
        print("none of the tests was found: nothing was run", file=sys.stderr)
        return 2
    count = Counter(outcome.result for outcome in found)
    print(", ".join(f"{count[result]} {result}" for result in (PASSED, FAILED, LEFT)))
    if given.write is not None:
        given.write.write_text(markdown(found, " and ".join(map(runner.version, given.checkouts))), encoding="utf-8")
    return 1 if unexpected(found) else 0


def unexpected(found: Sequence[Outcome]) -> list[Outcome]:
    """Failures that are not known, and tests that pass though they are known to fail."""
    return [each for each in found if each.result != LEFT and (each.result == FAILED) != bool(each.known)]


def markdown(found: Sequence[Outcome], version: str) -> str:
    """The page of the reference."""
    suites = {suite.name: [each for each in found if each.suite == suite.name] for suite in SUITES}
    lines = [INTRODUCTION.format(version=version, cases=FUZZ_CASES)]
    for name, each in suites.items():
        count = Counter(outcome.result for outcome in each)
        if each:
            lines.append(f"| {name} | {count[PASSED]} | {count[FAILED]} | {count[LEFT]} |")
    every = Counter(outcome.result for outcome in found)
    lines += [f"| all | {every[PASSED]} | {every[FAILED]} | {every[LEFT]} |", ""]
    lines += ["## What fails, and whose fault it is", "", "| test | whose |", "|---|---|"]
    faults: dict[tuple[str, str], Counter[str]] = {}
    for each in found:
        if each.result == FAILED:
            faults.setdefault((each.suite, each.known or each.why), Counter())[_name(each.test)] += 1
    lines += [f"| {suite}: {_listed(tests)} | {why} |" for (suite, why), tests in faults.items()]
    lines += ["", "## What does not apply", "", "| test | why |", "|---|---|"]
    lines += [f"| {each.suite}: `{each.test}` | {each.why} |" for each in found if each.result == LEFT]
    lines += [f"| {name} | {why} |" for name, why in NOT_RUN.items()]
    lines += ["", "## What passes", "", "| tests | |", "|---|---|"]
    for name, each in suites.items():
        if passed := Counter(_name(outcome.test) for outcome in each if outcome.result == PASSED):
            lines.append(f"| {name} | {_listed(passed)} |")
    return "\n".join([*lines, ""])


def _name(test: str) -> str:
    """A test's name without its class and case."""
    return test.rpartition("::")[2].partition("[")[0]


def _listed(tests: Counter[str]) -> str:
    return ", ".join(f"`{name}`" + (f" ({count} times)" if count > 1 else "") for name, count in tests.items())


if __name__ == "__main__":
    sys.exit(main())
