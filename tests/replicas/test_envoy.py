"""Three servers behind the real Envoy, with the configuration that deploy/envoy.py writes: `make replicas`."""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections import Counter
from typing import Any

import grpc
import pytest

from deploy.envoy import MEMBERS
from tests.conftest import triton_request
from tests.replicas.fleet import PROMPTS, REPLICAS, WHOLE, Callers, Fleet, Load, Proxy, Request, in_all, settle
from trident_client import Client, ForbiddenError, InvalidRequestError, UnavailableError
from trident_client import _protocol as pb
from trident_serving.launcher import processes

pytestmark = [pytest.mark.replicas, pytest.mark.timeout(1200)]

SERVICE = "/inference.GRPCInferenceService/"


def load(callers: Callers) -> Load:
    return Load(callers.kinds())


def upstreams(envoy: Proxy, requests: list[Request]) -> dict[str, list[int]]:
    """The ports of the servers that requests got to, by their ids."""
    found: dict[str, list[int]] = {request.id: [] for request in requests}
    for entry in envoy.entries():
        if entry["request_id"] in found and entry["server"]:
            found[entry["request_id"]].append(int(entry["server"].rpartition(":")[2]))
    return found


LOADS: list[Load] = []


def check(done: Load, envoy: Proxy, lost: set[int], capsys: Any, what: str) -> None:
    """Only answers whose beginning their callers had, from a server that was then lost, may fail.

    Args:
        lost: the ports of the server that was killed or frozen; {}: no answer may fail.
    """
    LOADS.append(done)
    failed = done.failed()
    places = upstreams(envoy, failed)
    bad = [
        each for each in failed if each.kind in WHOLE or each.first is None or not lost.intersection(places[each.id])
    ]
    report(done, envoy, capsys, f"{what}: {len(failed)} answers that had begun were lost")
    assert bad == []


def report(done: Load, envoy: Proxy, capsys: Any, what: str) -> None:
    entries = envoy.entries()
    ids = {request.id for request in done.requests}
    again = sum((entry["tries"] or 0) > 1 for entry in entries if entry["request_id"] in ids)
    with capsys.disabled():
        print(f"\n{what}; {again} asked again by Envoy; {done.told()}")


@pytest.fixture(scope="module")
def quiet(envoy: Proxy, callers: Callers) -> Load:
    """Load without a fault."""
    with load(callers) as done:
        settle(5)
    return done


def test_requests_are_spread(quiet: Load, envoy: Proxy, fleet: Fleet, capsys: Any) -> None:
    check(quiet, envoy, set(), capsys, "quiet")
    LOADS.clear()
    entries = {entry["request_id"]: entry for entry in envoy.entries()}
    for kind, share in (("stream", 0.2), ("http-stream", 0.1)):
        places = Counter(entries[each.id]["server"].rpartition(":")[2] for each in quiet.requests if each.kind == kind)
        assert len(places) == REPLICAS
        assert min(places.values()) > share * places.total(), places


@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_a_server_that_goes_takes_only_what_it_had_begun(
    fault: str, envoy: Proxy, callers: Callers, fleet: Fleet, capsys: Any
) -> None:
    lost = fleet.servers[0]
    with load(callers) as done:
        settle()
        getattr(fleet, fault)(0)
        began = time.monotonic()
        noticed = envoy.wait_for(fleet.servers[1:])
        settle(8)
        ended = time.monotonic()
        thawed = []
        if fault == "kill":
            fleet.start_again(0)
        else:
            thawed = fleet.thaw()
        envoy.wait_for(fleet.servers)
        settle()
    check(done, envoy, {lost.grpc_port, lost.http_port}, capsys, f"{fault}, noticed after {noticed:.1f} s")
    sent = [each for each in done.requests if each.began < began + 8]
    assert [pid for pid in thawed if processes.state(pid).dead] == []  # none took its silence for the server's
    # Nobody waited for the server to come back who had not begun to read.
    assert [each for each in sent if each.began + (each.first or each.seconds) > ended] == []


def test_a_server_that_drains_loses_nothing(envoy: Proxy, callers: Callers, fleet: Fleet, capsys: Any) -> None:
    with load(callers) as done:
        settle()
        assert fleet.drain(1) == 0
        settle()
        fleet.start_again(1)
        envoy.wait_for(fleet.servers)
    check(done, envoy, set(), capsys, "drain")


def test_a_rolling_update_loses_nothing(envoy: Proxy, callers: Callers, fleet: Fleet, capsys: Any) -> None:
    with load(callers) as done:
        settle()
        for index in range(REPLICAS):
            assert fleet.drain(index) == 0
            fleet.start_again(index)
            envoy.wait_for(fleet.servers)
        settle()
    check(done, envoy, set(), capsys, "rolling update")


def test_faults_in_all(quiet: Load, capsys: Any) -> None:
    told = in_all(quiet, LOADS or [quiet], "Envoy")
    with capsys.disabled():
        print(f"\n{told}")


def channel(envoy: Proxy, own: bool = True) -> grpc.Channel:
    folder = envoy.certificates
    pair = ((folder / "client.key").read_bytes(), (folder / "client.pem").read_bytes()) if own else (None, None)
    credentials = grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes(), *pair)
    target = envoy.grpc_url.removeprefix("grpcs://")
    return grpc.secure_channel(target, credentials, options=[("grpc.ssl_target_name_override", "triton")])


def status(envoy: Proxy, method: str, message: bytes = b"", stream: bool = False, **more: Any) -> grpc.StatusCode:
    """Of a raw call."""
    with channel(envoy) as connected:
        kind = connected.unary_stream if stream else connected.unary_unary
        call = kind(method, request_serializer=bytes, response_deserializer=bytes)
        try:
            answer = call(message, timeout=20, **more)
            if stream:
                list(answer)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


@pytest.mark.parametrize(
    "method",
    [
        *("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings"),
        *("SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister"),
        *("CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister", "ModelStatistics"),
    ],
)
def test_what_controls_a_server_is_refused_over_grpc(envoy: Proxy, fleet: Fleet, method: str) -> None:
    key = [("triton-grpc-protocol-trident-admin-key", fleet.servers[0].admin_headers["trident-admin-key"])]
    assert status(envoy, SERVICE + method, metadata=key) is grpc.StatusCode.PERMISSION_DENIED


def test_what_clients_need_is_let_through(envoy: Proxy, callers: Callers) -> None:
    for method in ("ServerLive", "ServerReady"):
        assert status(envoy, SERVICE + method) is grpc.StatusCode.OK
    assert status(envoy, "/grpc.health.v1.Health/Check") is grpc.StatusCode.OK
    for method in ("ModelReady", "ModelMetadata", "ModelConfig"):
        assert status(envoy, SERVICE + method, b"\x0a\x04talk") is grpc.StatusCode.OK
    for client in (callers.grpc, callers.http):
        assert client.generate(PROMPTS[0], model="talk", max_tokens=3).num_output_tokens == 3
        assert client.embed("a text", model="embed").shape == (32,)


def http_ask(
    envoy: Proxy, method: str, path: str, body: Any = None, own: bool = True, **headers: str
) -> tuple[int, str]:
    context = ssl.create_default_context(cafile=str(envoy.certificates / "ca.pem"))
    context.check_hostname = False
    if own:
        context.load_cert_chain(envoy.certificates / "client.pem", envoy.certificates / "client.key")
    connection = http.client.HTTPSConnection("127.0.0.1", envoy.options.http_port, context=context, timeout=20)
    try:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, names)
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/talk/load"),
        ("POST", "/v2/repository/models/talk/unload"),
        ("POST", "/v2//repository/index"),
        ("POST", "/v2/models/../repository/index"),
        ("GET", "/v2/systemsharedmemory/status"),
        ("POST", "/v2/cudasharedmemory/unregister"),
        ("GET", "/v2/trace/setting"),
        ("POST", "/v2/logging"),
        ("GET", "/v2/models/stats"),
        ("POST", "/v2/models/embed_model/infer"),
        ("GET", "/metrics"),
        ("GET", "/"),
    ],
)
def test_what_controls_a_server_is_refused_over_http(envoy: Proxy, fleet: Fleet, method: str, path: str) -> None:
    key = fleet.servers[0].admin_headers["trident-admin-key"]
    assert http_ask(envoy, method, path, b"{}" if method == "POST" else None, trident_admin_key=key)[0] == 403


def test_questions_over_http(envoy: Proxy) -> None:
    for path in ("/v2/health/ready", "/v2/models/talk", "/v2/models/talk/versions/1/ready", "/v2/models/embed/config"):
        assert http_ask(envoy, "GET", path)[0] == 200, path
    assert http_ask(envoy, "POST", "/v2/health/ready", b"{}")[0] == 403


@pytest.mark.parametrize(
    ("body", "headers", "code"),
    [
        (b'{"text_input": "' + b"x" * 3_200_000 + b'"}', {}, 413),
        (b"[" * 200_000, {}, 400),
        (b'{"text_input": "a", "deep": ' + b"[" * 250 + b"]" * 250 + b"}", {}, 400),
        (b"[" * 200_000, {"inference_header_content_length": "1"}, 400),
        (b"[" * 200_000, {"inference_header_content_length": "999999e-9"}, 400),
        (b"\x1f\x8b", {"content_encoding": "gzip"}, 415),
    ],
    ids=["large", "nested", "nested in a field", "as if bytes were behind it", "as no number", "compressed"],
)
def test_bodies_that_end_a_server_do_not_reach_it(
    envoy: Proxy, fleet: Fleet, body: bytes, headers: dict[str, str], code: int
) -> None:
    before = [server.log.read_text() for server in fleet.servers]
    for call in ("generate", "infer") if headers.get("inference_header_content_length") != "1" else ("generate",):
        got, said = http_ask(envoy, "POST", f"/v2/models/talk/{call}", body, **headers)
        assert got == code, said
    texts = json.dumps({"text_input": '["[' * 300 + '\\"[' * 300, "max_tokens": 2})  # brackets of a text are no JSON
    assert http_ask(envoy, "POST", "/v2/models/talk/generate", texts)[0] == 200
    assert [server.log.read_text() for server in fleet.servers] == before


def test_objects_of_very_many_members_do_not_reach_a_server(envoy: Proxy) -> None:
    def said(call: str, body: dict[str, Any]) -> tuple[int, str]:
        return http_ask(envoy, "POST", f"/v2/models/{call}", json.dumps(body))

    most = {f"m{number}": 0 for number in range(MEMBERS)}
    refused = (400, f"an object of the JSON has more than {MEMBERS} members")
    tensor = {"name": "text_input", "shape": [1, 1], "datatype": "BYTES", "data": ["a"]}
    for body in ({"text_input": "a", **most}, {"text_input": "a", "parameters": {**most, "one": "more"}}):
        assert said("talk/generate", body) == said("talk/generate_stream", body) == refused
    assert said("embed/infer", {"inputs": [tensor], "parameters": {**most, "one": "more"}}) == refused
    # One fewer gets there, which says what it thinks of them; and colons of texts are no members.
    fewer = dict([*most.items()][1:])
    assert "unknown input or parameter 'm1'" in said("talk/generate", {"text_input": "a", **fewer})[1]
    assert "unknown input or parameter 'm0'" in said("embed/infer", {"inputs": [tensor], "parameters": most})[1]
    assert said("talk/generate", {"text_input": '"' + ":" * (MEMBERS + 1), "max_tokens": 2})[0] == 200


def test_a_body_in_many_chunks_arrives_in_one(envoy: Proxy) -> None:
    body = json.dumps({"text_input": "x" * 500, "max_tokens": 2}).encode()
    chunks = (body[at : at + 1] for at in range(len(body)))
    assert http_ask(envoy, "POST", "/v2/models/talk/generate", chunks)[0] == 200


def test_a_large_message_is_refused(envoy: Proxy) -> None:
    message = pb.ModelInferRequest(model_name="embed", raw_input_contents=[b"x" * (17 * 2**20)]).SerializeToString()
    assert status(envoy, SERVICE + "ModelInfer", message) in (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNKNOWN,
    )


def test_a_header_that_ends_a_server_does_not_reach_it(envoy: Proxy, fleet: Fleet) -> None:
    request = triton_request("talk", {}).SerializeToString()
    before = [server.log.read_text() for server in fleet.servers]
    metadata = [("triton_grpc_error", "true")]
    for _ in range(2 * REPLICAS):
        assert status(envoy, SERVICE + "ModelStreamInfer", request, True, metadata=metadata) is grpc.StatusCode.OK
    time.sleep(0.5)
    assert [server.log.read_text() for server in fleet.servers] == before


def test_a_caller_without_a_certificate_is_refused(envoy: Proxy) -> None:
    with channel(envoy, own=False) as connected:
        call = connected.unary_unary(SERVICE + "ServerLive", request_serializer=bytes, response_deserializer=bytes)
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises((ssl.SSLError, ConnectionError)):
        http_ask(envoy, "GET", "/v2/health/live", own=False)
    with Client(f"127.0.0.1:{envoy.options.grpc_port}", timeout=5) as plain, pytest.raises(UnavailableError):
        plain.generate("x", model="talk")


def test_errors_come_through(callers: Callers) -> None:
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        callers.grpc.generate("x", model="talk", max_tokens=-1)
    with pytest.raises(ForbiddenError):
        callers.grpc.models()


def test_the_log_has_no_texts(envoy: Proxy, callers: Callers) -> None:
    secret = "words that nobody else has"
    callers.http.generate(secret, model="talk", max_tokens=2)
    callers.grpc.generate(secret, model="talk", max_tokens=2)
    http_ask(envoy, "GET", "/v2/models/talk?text=words-that-nobody", authorization="Bearer words-that-nobody")
    entries = envoy.entries()
    assert "words" not in envoy.log.read_text()
    assert {"/v2/models/talk/generate_stream", SERVICE + "ModelStreamInfer", "/v2/models/talk"} <= {
        entry["path"] for entry in entries
    }
    assert entries[-1]["caller"] == "CN=client"
