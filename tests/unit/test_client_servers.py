"""How the clients reach servers: which of several, through what, and for how long."""

from __future__ import annotations

import asyncio
import gc
import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tests.unit.test_client import Service, chunk, decode
from trident_client import (
    TLS,
    AsyncClient,
    CancelledError,
    Client,
    DeadlineExceededError,
    Health,
    InvalidRequestError,
    OverloadedError,
    ServerError,
    UnavailableError,
)
from trident_client._choice import FIRST_REST, Choice
from trident_client._connections import Connections
from trident_client._settings import Address, Settings
from trident_client._watch import Alarm, Watch
from trident_serving.launcher import local

PROMPT = {"model": "m"}


class Observed(Service):
    """The other tests' service, which also keeps headers, and has prompts of its own that fail."""

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.name = name
        self.headers: list[dict[str, str]] = []
        self.gate = threading.Event()
        self.full = False

    def ModelStreamInfer(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        self.headers.append(dict(context.invocation_metadata()))
        request = next(requests)
        text = decode(request)["text_input"].item().decode()
        if text == "who":
            yield chunk(self.name, "stop", 1)
        elif text == "one word, then silence":
            yield chunk("word", "", 1)
            self.gate.wait(20)
        elif text == "slow words":
            for index in range(6):
                time.sleep(0.06)
                yield chunk("word ", "stop" if index == 5 else "", index + 1)
        elif text == "one word, then gone":
            yield chunk("word", "", 1)
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        elif text == "no room":
            yield pb.ModelStreamInferResponse(error_message="UNAVAILABLE: the queue is full: 1 of 1 requests wait")
        else:
            yield from super().ModelStreamInfer(iter([request]), context)

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.headers.append(dict(context.invocation_metadata()))
        if self.full:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the queue is full: 1 of 1 texts wait already")
        return super().ModelInfer(request, context)

    def ServerLive(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.headers.append(dict(context.invocation_metadata()))
        return super().ServerLive(request, context)


@contextmanager
def serving(service: Observed, secure: grpc.ServerCredentials | None = None) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(8))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, secure) if secure else server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        service.gate.set()
        server.stop(0).wait()


@pytest.fixture
def both() -> Iterator[tuple[list[str], list[Observed]]]:
    services = [Observed("first"), Observed("second")]
    with serving(services[0]) as one, serving(services[1]) as other:
        yield [one, other], services


class Door:
    """Either client, with the calls of these tests."""

    def __init__(self, kind: type[Client] | type[AsyncClient]) -> None:
        self.kind = kind

    def __call__(self, url: str | list[str], work: Callable[[Any], Any], **options: Any) -> Any:
        """What `work` gives, a generator that yields calls and gets their answers."""
        if self.kind is Client:
            with Client(url, **options) as client:
                return self._drive(work(client))
        return asyncio.run(self._awaited(url, work, options))

    @staticmethod
    def _drive(steps: Any) -> Any:
        answer, error = None, None
        while True:
            try:
                step = steps.throw(error) if error else steps.send(answer)
            except StopIteration as end:
                return end.value
            answer, error = None, None
            try:
                answer = step() if callable(step) else list(step) if hasattr(step, "__next__") else step
            except Exception as raised:
                error = raised

    @staticmethod
    async def _awaited(url: Any, work: Any, options: Any) -> Any:
        async with AsyncClient(url, **options) as client:
            steps = work(client)
            answer, error = None, None
            while True:
                try:
                    step = steps.throw(error) if error else steps.send(answer)
                except StopIteration as end:
                    return end.value
                answer, error = None, None
                try:
                    step = step() if callable(step) else step
                    if hasattr(step, "__anext__"):
                        answer = [each async for each in step]
                    else:
                        answer = await step
                except Exception as raised:
                    error = raised


@pytest.fixture(params=[Client, AsyncClient], ids=["sync", "async"])
def door(request: pytest.FixtureRequest) -> Door:
    return Door(request.param)


# Which of several servers


def test_the_least_busy_server_is_chosen_and_equals_take_turns() -> None:
    choice = Choice(["a", "b", "c"])
    assert [choice.order()[0] for _ in range(6)] == ["a", "b", "c", "a", "b", "c"]
    with choice.using("a"), choice.using("b"), choice.using("b"):
        assert choice.order() == ["c", "a", "b"]
    assert sorted(choice.order()) == ["a", "b", "c"]


def test_a_server_that_failed_rests_longer_each_time() -> None:
    now = 0.0
    choice = Choice(["a", "b"], lambda: now)
    for rest in (FIRST_REST, 2 * FIRST_REST, 4 * FIRST_REST):
        assert choice.note("a", UnavailableError("connection refused"))
        assert choice.order() == ["b"]
        now += rest - 0.01
        assert choice.order() == ["b"]
        now += 0.02
        assert sorted(choice.order()) == ["a", "b"]
    choice.answered("a")
    choice.failed("a")
    choice.failed("b")
    assert not choice.another()
    assert sorted(choice.order()) == ["a", "b"]  # all failed: all are tried


def test_only_what_another_server_may_answer_goes_there() -> None:
    choice = Choice(["a", "b"])
    assert not choice.note("a", InvalidRequestError("no"))
    assert not choice.note("a", None)
    assert sorted(choice.order()) == ["a", "b"]
    assert not choice.note("a", DeadlineExceededError("late"))  # it was sent, and its time is over
    assert choice.order() == ["b"]
    assert not choice.note("b", UnavailableError("away"))


def test_requests_are_spread(door: Door, both: tuple[list[str], list[Observed]]) -> None:
    urls, services = both

    def work(client: Any) -> Any:
        found = []
        for _ in range(4):
            found.append((yield lambda: client.generate("who", **PROMPT)).text)
        vectors = yield lambda: client.embed(["a"] * 40, batch_size=1, **PROMPT)
        return found, vectors.tolist()

    assert door(urls, work) == (["first", "second", "first", "second"], [[1.0, 1.0]] * 40)
    assert all(len(service.requests) >= 10 for service in services)


def test_another_server_answers_for_one_that_is_not_there(door: Door, both: tuple[list[str], list[Observed]]) -> None:
    dead = [f"127.0.0.1:{port}" for port in local.free_ports(2)]

    def work(client: Any) -> Any:
        assert (yield lambda: client.generate("who", **PROMPT)).text == "first"
        assert [each.text for each in (yield client.stream("a b", **PROMPT))] == ["a ", "b "]
        vectors = yield lambda: client.embed(["a", "bb"] * 20, batch_size=1, **PROMPT)
        assert vectors.tolist() == [[1.0, 1.0], [2.0, 1.0]] * 20
        assert (yield lambda: client.embed("abc")).tolist() == [3.0, 1.0]  # whose model is looked for
        assert (yield lambda: client.health()) == Health(live=True, ready=False)

    door([dead[0], both[0][0], dead[1]], work)


def test_a_full_server_s_requests_go_to_another(door: Door, both: tuple[list[str], list[Observed]]) -> None:
    urls, services = both
    services[0].full = True

    def work(client: Any) -> Any:
        return (yield lambda: client.embed(["a"] * 20, batch_size=1, **PROMPT)).tolist()

    assert door(urls, work, wait_if_full=False) == [[1.0, 1.0]] * 20
    assert services[0].headers  # it was asked

    def alone(client: Any) -> Any:
        with pytest.raises(OverloadedError, match="queue is full"):
            yield lambda: client.embed(["a"] * 20, batch_size=1, **PROMPT)

    began = time.monotonic()
    door(urls[:1], alone, wait_if_full=False)
    assert time.monotonic() - began < 5


def test_nothing_is_sent_twice_once_an_answer_has_begun(door: Door, both: tuple[list[str], list[Observed]]) -> None:
    urls, services = both

    def begun(client: Any) -> Any:
        with pytest.raises(UnavailableError, match="gone"):
            yield client.stream("one word, then gone", **PROMPT)

    def refused(client: Any) -> Any:
        with pytest.raises(OverloadedError, match="queue is full"):
            yield lambda: client.generate("no room", **PROMPT)

    door(urls, begun)
    assert sum(len(service.headers) for service in services) == 1
    door(urls, refused)
    assert sum(len(service.headers) for service in services) == 3


def test_all_servers_are_away(door: Door) -> None:
    def work(client: Any) -> Any:
        for call in (client.generate, client.embed):
            with pytest.raises(UnavailableError, match="refused"):
                yield lambda call=call: call("x", **PROMPT)
        assert (yield lambda: client.health()) == Health(live=False, ready=False)

    began = time.monotonic()
    door([f"127.0.0.1:{port}" for port in local.free_ports(2)], work)
    assert time.monotonic() - began < 10


# Addresses, keys and headers


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("localhost:8001", Address("grpc", "localhost:8001", False)),
        ("dns:///triton:8001", Address("grpc", "dns:///triton:8001", False)),
        ("unix:/run/triton", Address("grpc", "unix:/run/triton", False)),
        ("grpc://triton:8001", Address("grpc", "triton:8001", False)),
        ("GRPCS://triton", Address("grpc", "triton", True)),
        ("http://triton:8000/", Address("http", "http://triton:8000", False)),
        ("https://host/models/one/", Address("http", "https://host/models/one", True)),
    ],
)
def test_addresses(url: str, address: Address) -> None:
    assert Address.parse(url, False) == address


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "the address of the server is empty"),
        ("ftp://x", "none of grpc, grpcs, http and https"),
        ("http://user:secret@x", "no user and no password"),
        ("grpc://x:1/v2", "is no address of a server"),
        ("http://x?key=1", "is no address of a server"),
        ("https://", "is no address of a server"),
        ([], "there is no address"),
    ],
)
def test_what_is_no_address(door: Door, url: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        door.kind(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"headers": {"x y": "1"}}, "can't be the name of a header"),
        ({"headers": {"grpc-timeout": "1"}}, "can't be the name of a header"),
        ({"headers": {"x-key": "a\nhidden"}}, "the header x-key must be a text of printable ASCII"),
        ({"api_key": "hidden é"}, "api_key must be a text of printable ASCII"),
        ({"tls": True, "url": "http://x"}, "is not encrypted, but tls= is given"),
        ({"max_message_bytes": 0}, "max_message_bytes must be at least 1"),
        ({"keepalive": 0.5}, "keepalive must be at least 1 second"),
        ({"retries": -1}, "retries must be a whole number, at least 0, found -1"),
        ({"retries": 1.5}, "retries must be a whole number, at least 0, found 1.5"),
        ({"retries": "2"}, "retries must be a whole number, at least 0, found '2'"),
        ({"retry_silence": 0.0}, "retry_silence must be above 0 seconds, found 0.0"),
        ({"retry_silence": float("nan")}, "retry_silence must be above 0 seconds, found nan"),
        ({"timeout": float("nan")}, "a timeout must be a number of seconds, or None for no limit, found nan"),
    ],
)
def test_settings_that_can_t_be(door: Door, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        door.kind(**options)
    assert "hidden" not in str(raised.value)


@pytest.mark.parametrize("seconds", [float("inf"), 1e15])
def test_a_timeout_without_end_is_none(door: Door, both: tuple[list[str], list[Observed]], seconds: float) -> None:
    def work(client: Any) -> Any:
        assert (yield lambda: client.generate("a b", **PROMPT)).text == "a b"
        assert (yield lambda: client.generate("a b", timeout=seconds, **PROMPT)).text == "a b"
        assert [chunk.text for chunk in (yield lambda: client.stream("a b", timeout=seconds, **PROMPT))] == ["a ", "b "]

    door(both[0], work, timeout=seconds)


def test_over_http_no_time_is_a_deadline_too() -> None:
    """Not a server that can't be reached, for which another one would be asked."""
    with Client("http://127.0.0.1:1") as client:
        for call in (lambda: client.generate("x", timeout=0.0, **PROMPT), lambda: client.parameters("m", timeout=0.0)):
            with pytest.raises(DeadlineExceededError, match="did not answer in time"):
                call()


def test_a_client_s_certificate_needs_its_key() -> None:
    with pytest.raises(ValueError, match="belong together"):
        TLS(certificate="x")


def test_headers_go_with_every_call(door: Door, both: tuple[list[str], list[Observed]]) -> None:
    urls, services = both
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    count = 0

    def headers() -> dict[str, str]:
        nonlocal count
        count += 1
        return {**trace, "X-Count": str(count)}

    def work(client: Any) -> Any:
        assert "hidden-key" not in repr(vars(client))
        yield lambda: client.health()
        yield lambda: client.generate("who", **PROMPT)
        yield lambda: client.embed("a", **PROMPT)

    door(urls[0], work, headers=headers, api_key="hidden-key")
    assert len(services[0].headers) == 3
    for index, sent in enumerate(services[0].headers):
        assert sent["traceparent"] == trace["traceparent"]
        assert sent["authorization"] == "Bearer hidden-key"
        assert int(sent["x-count"]) > index
    assert "hidden-key" not in repr(Settings(api_key="hidden-key", admin_key="hidden-key"))


def test_the_caller_s_span_goes_with_its_calls(door: Door, both: tuple[list[str], list[Observed]]) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    context = trace.SpanContext(1, 2, is_remote=False, trace_flags=trace.TraceFlags(1))

    def work(client: Any) -> Any:
        with trace.use_span(trace.NonRecordingSpan(context)):
            yield lambda: client.generate("who", **PROMPT)

    door(both[0][0], work)
    assert both[1][0].headers[-1]["traceparent"] == f"00-{1:032x}-{2:016x}-01"


def test_messages_have_a_limit(door: Door, both: tuple[list[str], list[Observed]]) -> None:
    def work(client: Any) -> Any:
        with pytest.raises(InvalidRequestError, match="larger than max"):
            yield lambda: client.generate("x" * 2000, **PROMPT)  # an answer as long, too
        return (yield lambda: client.generate("x" * 100, **PROMPT)).text

    assert door(both[0][0], work, max_message_bytes=1000) == "x" * 100


# Encryption


def openssl(folder: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority (ca.pem), and what it signed: server.pem for the name "triton", client.pem."""
    if shutil.which("openssl") is None:
        pytest.skip("this machine has no openssl, which makes the certificates")
    folder = tmp_path_factory.mktemp("certificates")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(folder, "req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=authority")
    for name in ("server", "client"):
        openssl(folder, "req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / f"{name}.txt").write_text("subjectAltName=DNS:triton\n")
        words = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", f"{name}.txt")
        openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *words)
    return folder


@pytest.mark.parametrize("mutual", [False, True])
def test_encrypted(door: Door, certificates: Path, mutual: bool) -> None:
    pair = [((certificates / "server.key").read_bytes(), (certificates / "server.pem").read_bytes())]
    authority = (certificates / "ca.pem").read_bytes() if mutual else None
    secure = grpc.ssl_server_credentials(pair, authority, require_client_auth=mutual)
    own = {"certificate": certificates / "client.pem", "key": certificates / "client.key"}
    trusting = TLS(ca=certificates / "ca.pem", server_name="triton", **(own if mutual else {}))
    refused = [TLS(server_name="triton"), TLS(ca=certificates / "ca.pem", server_name="other", **own)]
    if mutual:
        refused.append(TLS(ca=certificates / "ca.pem", server_name="triton"))

    def work(client: Any) -> Any:
        return (yield lambda: client.generate("who", **PROMPT)).text

    with serving(Observed("safe"), secure) as url:
        assert door(url, work, tls=trusting) == "safe"
        assert door(f"grpcs://{url}", work, tls=trusting) == "safe"
        for tls in refused:
            with pytest.raises(UnavailableError):
                door(url, work, tls=tls)
        with pytest.raises(UnavailableError):
            door(url, work)


# How long


def test_a_silent_stream_ends(door: Door, both: tuple[list[str], list[Observed]]) -> None:
    """The client's own timeout limits silence; a call's limits all of it."""

    def work(client: Any) -> Any:
        began = time.monotonic()
        with pytest.raises(DeadlineExceededError, match="no response for 0.2 s"):
            yield client.stream("one word, then silence", **PROMPT)
        assert 0.2 <= time.monotonic() - began < 2
        assert len((yield client.stream("slow words", **PROMPT))) == 6  # in 0.36 s
        with pytest.raises(DeadlineExceededError):
            yield client.stream("slow words", timeout=0.2, **PROMPT)
        with pytest.raises(DeadlineExceededError):
            yield lambda: client.generate("slow words", **PROMPT)
        assert (yield lambda: client.generate("slow words", timeout=5.0, **PROMPT)).text == "word " * 6

    door(both[0][0], work, timeout=0.2)


def test_a_slow_reader_is_not_a_silent_server(both: tuple[list[str], list[Observed]]) -> None:
    with Client(both[0][0], timeout=0.1) as client:
        stream = client.stream("one two", timeout=0.3, **PROMPT)
        time.sleep(0.4)  # the time of a stream begins when somebody looks for its first chunk
        assert len(list(stream)) == 2
        for _ in client.stream("one two", **PROMPT):
            time.sleep(0.3)

    async def main() -> None:
        async with AsyncClient(both[0][0], timeout=0.1) as awaited:
            async for _ in awaited.stream("one two", **PROMPT):
                await asyncio.sleep(0.3)

    asyncio.run(main())


def test_the_watch_has_a_thread_only_while_it_watches() -> None:
    watch, gone, ended = Watch(), threading.Event(), threading.Event()
    with watch.over(ended.set) as quick, watch.over(gone.set) as slow:
        with slow.limited(time.monotonic() + 100), quick.limited(time.monotonic() + 0.05):
            thread = watch._thread
            assert thread is not None
            assert ended.wait(2)
        assert (quick.ended, slow.ended, gone.is_set()) == (True, False, False)
    thread.join(2)
    assert (thread.is_alive(), watch._thread) == (False, None)


def test_an_alarm_does_not_hide_that_the_task_is_cancelled() -> None:
    async def sleep(seconds: float) -> None:
        with Alarm(seconds, "too long"):
            await asyncio.sleep(5)

    async def main() -> None:
        with pytest.raises(DeadlineExceededError, match="too long"):
            await sleep(0.01)
        await asyncio.sleep(0)  # the task itself goes on
        task = asyncio.create_task(sleep(2))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


# What is left behind


def left() -> tuple[int, int, int]:
    """Threads of Python, threads of the process, and open files."""
    gc.collect()
    return threading.active_count(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def settled(limits: tuple[int, int, int], seconds: float = 5) -> tuple[int, int, int]:
    until = time.monotonic() + seconds
    while any(now > limit for now, limit in zip(left(), limits, strict=True)) and time.monotonic() < until:
        time.sleep(0.05)
    return left()


CLIENTS = 1000


def test_nothing_is_left_of_a_thousand_clients(both: tuple[list[str], list[Observed]]) -> None:
    url = both[0][0]

    def use() -> None:
        with Client(url) as client:
            assert client.embed("abc", **PROMPT).tolist() == [3.0, 1.0]
            next(client.stream("one two", **PROMPT))  # not read to its end

    async def use_async() -> None:
        async with AsyncClient(url) as client:
            assert (await client.embed("abc", **PROMPT)).tolist() == [3.0, 1.0]
            await anext(client.stream("one two", **PROMPT))

    async def many(count: int) -> int:
        for _ in range(count):
            await use_async()
        await asyncio.sleep(0.05)
        return len(asyncio.all_tasks())

    for _ in range(8):  # all threads of the server
        use()
    asyncio.run(many(8))
    before = left()
    for _ in range(CLIENTS // 2):
        use()
    assert asyncio.run(many(CLIENTS // 2)) == 1
    # gRPC's own pool of threads breathes.
    assert all(now <= was + 4 for was, now in zip(before, settled(before), strict=True)), (before, left())


def test_a_closed_client_says_so(door: Door, both: tuple[list[str], list[Observed]]) -> None:
    def work(client: Any) -> Any:
        yield lambda: client.health()
        yield client.close
        for call in (client.generate, client.embed):
            with pytest.raises(CancelledError, match="the client was closed"):
                yield lambda call=call: call("x", **PROMPT)

    door(both[0][0], work)


def test_an_async_client_belongs_to_one_loop(both: tuple[list[str], list[Observed]]) -> None:
    client = AsyncClient(both[0][0])

    async def use() -> None:
        await client.health()

    asyncio.run(use())
    with pytest.raises(RuntimeError, match="belongs to another event loop"):
        asyncio.run(use())


def test_an_import_brings_only_what_everybody_needs() -> None:
    code = "import sys, trident_client; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"httpx2", "opentelemetry", "tritonclient", "trident_serving"} & set(found)


def test_http_without_its_extra(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    for module in ("_http", "_http_client", "_http_async"):
        monkeypatch.delitem(sys.modules, f"trident_client.{module}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"needs httpx2: pip install 'trident-serving\[http\]'"):
        door.kind("http://localhost:8000")


def test_a_connection_in_use_outlives_others_that_hang() -> None:
    """What is sent over one that was replaced goes on, however often that happens; what nobody uses is closed."""
    made: list[int] = []

    def connect(again: bool) -> int:
        assert again == bool(made)
        made.append(len(made))
        return made[-1]

    connections = Connections(connect)
    first, end = connections.begin()
    assert connections.renew(time.monotonic()) == []
    for number in range(1, 12):
        with connections.using() as latest:
            assert (latest, connections.renew(0.0)) == (number, [])  # younger than what hung
        assert connections.renew(time.monotonic()) == [number]
        assert connections.all() == [first, number + 1]
    end()
    assert connections.renew(time.monotonic()) == [first, 12]


def test_a_stream_goes_on_while_other_requests_hang(both: tuple[list[str], list[Observed]]) -> None:
    """Each try of theirs begins a connection of its own, and the stream keeps the one that it has."""
    urls, services = both
    with Client(urls[0], timeout=20) as client:
        stream = client.stream("one word, then silence", **PROMPT)
        words = [next(stream).text]
        for _ in range(12):
            client._servers.all()[0].renew(time.monotonic())
        services[0].gate.set()
        assert words + [each.text for each in stream] == ["word"]

    async def main() -> None:
        async with AsyncClient(urls[1], timeout=20) as awaited:
            stream = awaited.stream("one word, then silence", **PROMPT)
            words = [(await anext(stream)).text]
            for _ in range(12):
                await awaited._servers.all()[0].renew(time.monotonic())
            services[1].gate.set()
            assert words + [each.text async for each in stream] == ["word"]

    asyncio.run(main())


class Dripping(http.server.BaseHTTPRequestHandler):
    """Answers little by little, so that no wait is long and there is no end."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-length", "1000")
        self.end_headers()
        for _ in range(30):
            try:
                self.wfile.write(b"x")
            except OSError:
                return
            time.sleep(0.1)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


@pytest.mark.parametrize("options", [{"timeout": 0.5}, {"timeout": 0.5, "retries": 1, "retry_silence": 0.2}])
def test_an_answer_that_drips_has_its_time(door: Door, options: dict[str, Any]) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dripping) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def work(client: Any) -> Any:
            began = time.monotonic()
            with pytest.raises(DeadlineExceededError, match="did not answer in time"):
                yield lambda: client.embed("x", **PROMPT)
            assert time.monotonic() - began < 2

        door(f"http://127.0.0.1:{server.server_port}", work, **options)
        server.shutdown()


class Stranger(http.server.BaseHTTPRequestHandler):
    """Answers everything with 200 and its server's `answer`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-length", str(len(self.server.answer)))  # type: ignore[attr-defined]
        self.end_headers()
        self.wfile.write(self.server.answer)  # type: ignore[attr-defined]

    do_POST = do_GET  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


@pytest.mark.parametrize(
    "answer", [b"", b"<html>", b"[]", b'{"outputs": [{}], "model_stats": [5]}', b"data: 5", b"data: {"]
)
def test_what_is_no_server_of_ours(door: Door, answer: bytes) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        server.answer = answer  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def work(client: Any) -> Any:
            for call in (client.embed, client.generate):
                with pytest.raises((ServerError, UnavailableError)):
                    yield lambda call=call: call("x", **PROMPT)
            with pytest.raises(ServerError, match="not one of Triton's"):
                yield lambda: client.embed("x")

        door(f"http://127.0.0.1:{server.server_port}", work, timeout=10)
        server.shutdown()
