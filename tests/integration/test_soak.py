"""A short soak through the code of `make soak`, against the server that other tests use too."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.soak import report, session
from tests import gateways
from trident_serving.launcher.local import LocalServer

SECONDS = 12


@pytest.mark.slow  # half a minute; its parts have tests of their own (tests/unit/test_soak.py)
def test_a_short_soak_finds_nothing(server: LocalServer, tmp_path: Path) -> None:
    with gateways.running(tmp_path / "log", server.grpc_url) as gateway:
        outcome = session.run(
            server,
            SECONDS,
            ["minilm_int8_static"],
            print,
            touch=False,
            cached=False,
            period=1.0,
            gateway_port=gateway.port,
        )
    assert report.findings(outcome, short=True) == []
    kinds = Counter(entry.kind for entry in outcome.entries if entry.outcome == "good")
    assert {kind.split()[0] for kind in kinds} >= {"smollm2", "minilm", "minilm_int8"}
    assert {kind.partition(" by ")[2] for kind in kinds} >= {"gateway", "gateway stream"}
    assert outcome.count("good") > 20
    assert outcome.count("refused") > 20
    assert {"tritonserver", "launcher", "smollm2", "minilm_model", "translate"} <= outcome.watch.series.keys()
    assert outcome.watch.shared[1][-1] > 0
