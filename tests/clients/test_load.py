"""The other drivers of `make load` against the gateway's models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.load import __main__ as load
from tests.conftest import ROOT
from tests.gateways import Gateway
from trident_serving.launcher.local import LocalServer

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1800)]

WHOLE = ("classify", "embed", "rank", "tag", "translate")


def test_perf_analyzer_and_aiperf(
    gateway_server: LocalServer, gateway: Gateway, gateway_folder: Path, tmp_path: Path
) -> None:
    flags = ["--url", gateway_server.grpc_url, "--http-url", gateway_server.http_url, "--gateway-url", gateway.url]
    flags += [
        "--models",
        "classify,embed,rank,tag,talk,translate",
        "--seconds",
        "2",
        "--streams",
        "2",
        "--rate",
        "5",
        "--tokens",
        "6",
    ]
    flags += ["--tokenizer", str(gateway_folder / "talk/tokenizer.json"), "--cache", str(ROOT / ".cache")]
    assert load.main([*flags, "--reports", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "load.json").read_text(encoding="utf-8"))
    assert found["left_out"] == found["faults"] == []
    others = {(run["model"], run["driver"], run["door"]) for run in found["runs"] if run["driver"] != "trident"}
    assert others == {
        *((model, "perf_analyzer", door) for model in WHOLE for door in ("grpc", "http")),
        ("talk", "perf_analyzer", "grpc"),
        *((model, "aiperf", "gateway") for model in ("embed", "rank", "talk")),
        ("talk", "aiperf chat", "gateway"),
    }
    for run in found["runs"]:
        assert run["requests"] > 0, run
        assert run["failed"] == 0, run
        assert run["latency"]["p50"] > 0, run
        assert (run["first_token"] is not None) == (run["model"] == "talk"), run
