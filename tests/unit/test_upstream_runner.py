"""What runs Triton's own tests: edits of their text, what pytest reports, and what counts as known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.upstream import __main__ as command
from tests.upstream import runner
from tests.upstream.runner import FAILED, LEFT, PASSED, Outcome
from tests.upstream.suites import SUITES, Suite

SERVER: Any = SimpleNamespace(http_port=1, grpc_port=2, metrics_port=3)
REPORT = """<testsuites><testsuite>
<testcase classname="a_test.T" name="test_right"/>
<testcase classname="a_test.T" name="test_wrong"><failure message="one&#10;two">trace</failure></testcase>
<testcase classname="a_test.T" name="test_known"><error message="three"/></testcase>
<testcase classname="a_test.T" name="test_mended"/>
<testcase classname="a_test.T" name="test_skipped"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def test_ports_are_changed_and_nothing_else() -> None:
    text = 'a("localhost:8000"); b("http://localhost:8002/metrics", 8001, "localhost:80010"); c("127.0.0.1", 8001)'
    assert runner.edited(text, SERVER, {"b": "d"}) == (
        'a("127.0.0.1:1"); d("http://127.0.0.1:3/metrics", 8001, "localhost:80010"); c("127.0.0.1", 2)'
    )


def test_an_edit_that_finds_nothing_is_an_error() -> None:
    with pytest.raises(AssertionError, match="gone"):
        runner.edited("a", SERVER, {"gone": ""})


def test_checkouts_may_have_blanks_in_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (spaced := tmp_path / "a server").mkdir()
    assert runner.checkouts([str(spaced)]) == [spaced]
    assert runner.checkouts(["/one ~/two", "three"]) == [Path("/one"), Path("/home/me/two"), Path("three")]
    assert runner.checkouts([""]) == []


def test_unknown_failures_and_mended_faults_are_unexpected(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    faults = {"test_known": "the test's", "test_mended": "the server's"}
    suite = Suite("qa/L0_a", "a_test.py", lambda folder, repository: None, faults=faults)
    found = list(runner.outcomes(suite, tmp_path / "report.xml"))
    assert [(each.test, each.result, each.why, each.known) for each in found] == [
        ("T::test_right", PASSED, "", ""),
        ("T::test_wrong", FAILED, "one two", ""),
        ("T::test_known", FAILED, "three", "the test's"),
        ("T::test_mended", PASSED, "", "the server's"),
        ("T::test_skipped", LEFT, "skips itself: no GPU", ""),
    ]
    assert [each.test for each in command.unexpected(found)] == ["T::test_wrong", "T::test_mended"]


def test_the_page_counts() -> None:
    suite = SUITES[0].name
    outcomes = [
        Outcome(suite, "T::a", PASSED),
        Outcome(suite, "T::b", FAILED, "x", "the test's"),
        Outcome(suite, "c", LEFT),
    ]
    page = command.markdown(outcomes, "v1 of 2024-10-28")
    assert f"| {suite} | 1 | 1 | 1 |" in page
    assert f"| {suite}: `b` | the test's |" in page
    assert "This page is of v1 of 2024-10-28." in page


def test_without_a_checkout_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    assert "nothing was run" in capsys.readouterr().out
    assert command.main([str(tmp_path)]) == 2
    assert "is no checkout" in capsys.readouterr().err


def test_a_checkout_without_the_tests_proves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.environments, "environment", lambda name: tmp_path)
    (tmp_path / "qa").mkdir()
    (tmp_path / "page.md").write_text("before")
    for more in (("--write", str(tmp_path / "page.md")), ("--suite", "no such suite")):
        assert command.main([str(tmp_path), *more]) == 2
        assert "nothing was run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main([str(tmp_path), "--write", str(tmp_path / "page.md"), "--suite", "fuzz"])
    assert "--write writes the page of all suites" in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == "before"
