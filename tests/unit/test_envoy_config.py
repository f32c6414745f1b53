"""What deploy/envoy.py promises of every configuration; tests/replicas runs one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import envoy
from deploy.envoy import Server
from trident_client import _protocol as pb
from trident_serving.launcher.admin_key import HEADER, RESTRICTED

PLAIN = ["--listen=127.0.0.1", "--server=10.0.0.1", "--server=pods.example:18000:18001"]
FILES = ["--certificate=/tls/own.pem", "--key=/tls/own.key", "--client-ca=/tls/ca.pem"]


def listeners(*arguments: str) -> dict[str, Any]:
    made = yaml.safe_load(envoy.written(envoy.parse(arguments)))
    return {each["name"]: each for each in made["static_resources"]["listeners"]}


def manager(listener: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return found


def routes(listener: dict[str, Any]) -> list[dict[str, Any]]:
    (host,) = manager(listener)["route_config"]["virtual_hosts"]
    found: list[dict[str, Any]] = host["routes"]
    return found


def http_status(listener: dict[str, Any], method: str, path: str) -> int:
    """200 where a route leads to a server."""
    for route in routes(listener):
        wanted = [header["string_match"]["exact"] for header in route["match"].get("headers", [])]
        exact = re.escape(route["match"].get("path", "")) or ".*"
        pattern = route["match"].get("safe_regex", {"regex": exact})["regex"]
        if wanted in ([], [method]) and re.fullmatch(pattern, path):
            return 200 if "route" in route else int(route["direct_response"]["status"])
    raise AssertionError(path)


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("a.example", Server("a.example", 8000, 8001)),
        ("10.0.0.1:18000:18001", Server("10.0.0.1", 18000, 18001)),
        ("[::1]", Server("::1", 8000, 8001)),
        ("[::1]:1:2", Server("::1", 1, 2)),
    ],
)
def test_servers(text: str, server: Server) -> None:
    assert Server.parse(text) == server


@pytest.mark.parametrize("text", ["", "a:1", "a:1:b", "a:1:70000", ":1:2"])
def test_what_is_no_server(text: str) -> None:
    with pytest.raises(ValueError, match="is no server: give HOST, or HOST:HTTP_PORT:GRPC_PORT"):
        Server.parse(text)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--listen=127.0.0.1"], "there is no server"),
        (["--server=a"], "0.0.0.0 can be reached from other machines"),
        ([*PLAIN, FILES[0]], "go together"),
        ([*PLAIN, "--http-body-bytes=4194304"], "at most 3.5 MiB"),
        ([*PLAIN, "--model=a|b"], "'a|b' is no name of a model"),
    ],
)
def test_what_is_refused(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert envoy.main(arguments) == 2
    assert why in capsys.readouterr().err


def test_callers_need_a_certificate() -> None:
    for name, listener in listeners("--server=a", *FILES).items():
        socket = listener["filter_chains"][0]["transport_socket"]["typed_config"]
        assert socket["require_client_certificate"] is True, name
        assert socket["common_tls_context"]["validation_context"] == {"trusted_ca": {"filename": "/tls/ca.pem"}}
    assert "transport_socket" not in listeners(*PLAIN)["grpc"]["filter_chains"][0]


def test_grpc_lets_through_what_is_listed_and_knows_every_call_of_triton() -> None:
    *allowed, last = routes(listeners(*PLAIN)["grpc"])
    paths = {route["match"]["path"] for route in allowed}
    assert (last["match"], last["direct_response"]["status"]) == ({"prefix": "/"}, 403)
    assert paths == {envoy.HEALTH, *(envoy.SERVICE + name for name in (*envoy.QUESTIONS, *envoy.ANSWERS))}
    assert f"/{pb.SERVICE}/" == envoy.SERVICE
    assert {"model-repository", "shared-memory", "trace", "logging"} <= {*RESTRICTED}
    more = {route["match"].get("path") for route in routes(listeners(*PLAIN, "--statistics")["grpc"])}
    assert more - paths == {envoy.SERVICE + "ModelStatistics", None}


def test_http_lets_through_the_models_that_are_named() -> None:
    every, some = listeners(*PLAIN)["http"], listeners(*PLAIN, "--model=talk", "--model=v1.5")["http"]
    for path in ("/v2/models/talk/infer", "/v2/models/talk/versions/2/generate", "/v2/models/v1.5/generate_stream"):
        assert [http_status(each, "POST", path) for each in (every, some)] == [200, 200]
    assert [http_status(each, "POST", "/v2/models/v115/infer") for each in (every, some)] == [200, 403]
    for path in ("/v2/models/talk/load", "/v2/repository/index", "/v2/models/a/b/infer", "/v2/models/talk/infer/x"):
        assert [http_status(each, "POST", path) for each in (every, some)] == [403, 403]
    assert http_status(every, "GET", "/v2/models/stats") == 403
    assert http_status(listeners(*PLAIN, "--statistics")["http"], "GET", "/v2/models/stats") == 200
    assert http_status(every, "GET", "/v2/models/talk/infer") == 403
    assert http_status(every, "GET", "/v2/health/ready") == 200


@pytest.mark.parametrize("name", ["grpc", "http"])
def test_what_no_listener_lets_through(name: str) -> None:
    made = manager(listeners(*PLAIN)[name])
    assert {HEADER, f"triton-grpc-protocol-{HEADER}"} <= {*made["route_config"]["request_headers_to_remove"]}
    assert made["common_http_protocol_options"]["headers_with_underscores_action"] == "DROP_HEADER"
    assert made["normalize_path"] is made["merge_slashes"] is True
    entries = made["access_log"][0]["typed_config"]["log_format"]["json_format"]
    assert not any("QUERY" in value or "AUTHORIZATION" in value.upper() for value in entries.values())
    for route in (each for each in routes(listeners(*PLAIN)[name]) if "route" in each):
        retries = route["route"]["retry_policy"]
        assert (retries["num_retries"], "5xx" in retries["retry_on"]) == (1, False)


def test_the_command_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/run-several-servers.md").read_text()
    command = re.search(r"deploy/envoy\.py (.*?) > envoy\.yaml", page.replace("\\\n", " "))
    assert command is not None
    assert len(envoy.parse(command[1].split()).servers) == 3
