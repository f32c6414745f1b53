"""Triton's own tests against our launcher's server, where TRITON_CHECKOUTS names checkouts of its repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.clients import environments
from tests.upstream import runner
from tests.upstream.__main__ import unexpected
from tests.upstream.runner import PASSED
from tests.upstream.suites import SUITES, Suite

CHECKOUTS = runner.checkouts([os.environ.get("TRITON_CHECKOUTS", "")])
pytestmark = [
    pytest.mark.clients,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not CHECKOUTS, reason="TRITON_CHECKOUTS names no checkout of triton-inference-server/server"),
]


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_they_pass_but_for_known_faults(suite: Suite, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    checkout = runner.source(suite, CHECKOUTS)
    if checkout is None:
        pytest.skip("no checkout has it")
    if suite.openai:
        request.getfixturevalue("default_repository")
    found = runner.run(suite, checkout, tmp_path, environments.environment("upstream") / "python")
    assert unexpected(found) == []
    assert any(each.result == PASSED for each in found)
