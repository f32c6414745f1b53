"""`make load` against the gateway's tiny models: all doors, every answer right, figures in the reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load import __main__ as load
from tests.gateways import Gateway
from trident_serving.launcher.local import LocalServer

SHORT = ("--seconds", "0.2", "--streams", "1,4", "--tokens", "6", "--drivers", "")


def places(server: LocalServer, gateway: Gateway) -> list[str]:
    return ["--url", server.grpc_url, "--http-url", server.http_url, "--gateway-url", gateway.url]


def reported(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "load.json").read_text(encoding="utf-8"))
    return found


def verified(found: dict[str, Any], models: Sequence[str], doors: Sequence[str]) -> None:
    """Each model was measured at each door, with figures that fit together."""
    assert found["faults"] == []
    for model in models:
        mine = [run for run in found["runs"] if run["model"] == model]
        assert {(run["door"], run["streams"]) for run in mine} == {
            (door, streams) for door in doors for streams in (1, 4, None)
        }
        for run in mine:
            assert run["requests"] > 0
            assert (run["wrong"], run["failed"], run["full"]) == (0, 0, 0)
            assert run["latency"]["p50"] <= run["latency"]["p99"]
            assert run["goodput"] == 1.0
            if model == "talk":
                assert run["tokens_per_second"] == pytest.approx(6 * run["requests_per_second"])
                assert run["first_token"]["p50"] < run["latency"]["p50"]
        names = {f"{door}/grpc at {streams}" for door in doors for streams in (1, 4) if door != "grpc"}
        assert set(found["ratios"][model]) == names | {f"{door}: 4 at a time/1" for door in doors}


def test_every_door(gateway_server: LocalServer, gateway: Gateway, tmp_path: Path) -> None:
    models = ("embed", "rank", "talk")
    flags = [*places(gateway_server, gateway), "--models", ",".join(models), "--rate", "20", *SHORT]
    flags += ["--latency-ms", "60000", "--first-token-ms", "60000", "--inter-token-ms", "60000"]
    assert load.main([*flags, "--reports", str(tmp_path)]) == 0
    found = reported(tmp_path)
    verified(found, models, ("grpc", "http", "gateway"))
    assert found["left_out"] == []
    text = (tmp_path / "load.md").read_text(encoding="utf-8")
    assert "; 0 were others." in text
    assert "| trident | gateway | 20 a second, at random |" in text
    assert "<svg" in (tmp_path / "load.svg").read_text(encoding="utf-8")


def test_what_can_not_be_measured(
    gateway_server: LocalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--url", gateway_server.grpc_url, "--reports", str(tmp_path), *SHORT]
    for more, message in (
        (["--models", "nothing"], "there is no model nothing, but there are chain, "),
        (["--doors", "gateway"], "there is no door gateway, but there are grpc"),
        (["--url", "127.0.0.1:9"], "the server at 127.0.0.1:9 does not answer: "),
    ):
        assert load.main([*flags, *more]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_of_it(gateway_folder: Path, gateway_server: LocalServer, tmp_path: Path) -> None:
    """With a server and a gateway of its own, every model, and ratios that are stored and compared."""
    flags = ["--repository", str(gateway_folder / "repository"), "--reports", str(tmp_path), *SHORT]
    flags += ["--latency-ms", "60000", "--first-token-ms", "60000", "--inter-token-ms", "60000"]
    stored = ["--check", "--rate", "20", "--rounds", "3", "--ratios", str(tmp_path / "ratios.json")]
    assert load.main([*flags, *stored, "--update"]) == 0
    models = ("chain", "classify", "embed", "rank", "tag", "talk", "translate")
    found = reported(tmp_path)
    verified(found, models, ("grpc", "http", "gateway"))
    assert all(len(run["rounds"]) == (1 if run["streams"] is None else 3) for run in found["runs"])
    only = [*flags, *stored, "--models", "embed"]
    assert load.main([*only, "--tolerance", "50"]) == 0
    content = json.loads((tmp_path / "ratios.json").read_text())
    content["ratios"]["embed"]["http/grpc at 4"] *= 100
    (tmp_path / "ratios.json").write_text(json.dumps(content))
    assert load.main([*only, "--tolerance", "0.9"]) == 1
