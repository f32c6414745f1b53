"""Both clients over gRPC and HTTP: the same answers, hang-ups, frozen servers, encryption, and nothing left behind.

The other tasks' answers through every door are compared where their servers are (`tests.doors`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel

from tests import doors, tiny_models
from tests.integration.test_architectures import hugging_face
from tests.integration.test_launcher import children
from tests.unit.test_client_servers import certificates, left, settled
from trident_client import (
    TLS,
    AsyncClient,
    Client,
    DeadlineExceededError,
    ForbiddenError,
    Health,
    InvalidRequestError,
    NotFoundError,
    TridentError,
    UnavailableError,
)
from trident_export import install, models_file
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer

__all__ = ["certificates"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "The quick brown fox jumps over the"
LONG: Any = {"model": "m", "max_tokens": 8000, "min_tokens": 8000, "prompt_lookup": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("doors")
    causal = tiny_models.make_causal(root / "hf", "llama", context=8192)
    reader = tiny_models.make_reader(root / "reader-hf", "bert", AutoModel)
    limits = "{ max_tokens = 96, buckets = [32], threads = 1, dimensions = 32 }"
    entries = {
        "m": tiny_models.causal_entry(causal, context=8192, slots=4),
        "reader": f'task = "feature-extraction"\nsource = {{ path = "{reader}" }}\nvariants = ["fp32"]\n'
        f"limits = {limits}\n",
    }
    (root / "models.toml").write_text(tiny_models.models_toml(entries))
    install.export(models_file.load(root / "models.toml"), root / "repository", root, root / "cache", lambda line: None)
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LocalServer]:
    with local.running(folder / "repository", folder / "log") as running:
        yield running


def test_answers(server: LocalServer, folder: Path) -> None:
    options: dict[str, Any] = {"model": "m", "max_tokens": 24}
    numbers = {**options, "return_log_probs": True, "top_logprobs": 3, "prompt_logprobs": 2}
    found = doors.answers(
        server,
        lambda client: client.generate(PROMPT, **options),
        lambda client: client.generate("emoji 😀 中文", **options),
        lambda client: client.generate(PROMPT, **numbers),
        lambda client: client.generate(PROMPT, temperature=1.5, random_seed=2**64 - 1, **options),
        lambda client: client.generate_many(PROMPT, 3, temperature=1.0, random_seed=5, **numbers),
        lambda client: client.generate(PROMPT, stop_words=["e"], stop_token_ids=[3, 5], logit_bias={7: 1.5}, **options),
        lambda client: client.embed(["a b c", "some longer text, 中文 too"] * 20, batch_size=4),
        lambda client: client.embed("a b c"),
        lambda client: client.health(),
        lambda client: client.models(),
        lambda client: client.unverified("m"),
    )
    assert found[0].text == hugging_face(folder / "hf", PROMPT, 24)
    assert found[2].text == found[0].text
    assert [len(tops) for tops in found[2].top_log_probs] == [3] * 24
    assert {len(tops) for tops in found[2].prompt_top_log_probs} == {2}
    assert len({answer.text for answer in found[4]}) == 3
    assert found[8] == Health(live=True, ready=True)
    assert [model.name for model in found[9]][:1] == ["m"]


def test_streams(server: LocalServer) -> None:
    """Chunks are cut by time, so only their sum is the same."""
    for url in (server.grpc_url, server.http_url):
        with Client(url) as client:
            options: Any = {"model": "m", "max_tokens": 400, "min_tokens": 400, "return_log_probs": True}
            whole = client.generate(PROMPT, **options)
            chunks = list(client.stream(PROMPT, prompt_lookup=False, **options))
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert sum((chunk.log_probs for chunk in chunks), ()) == whole.log_probs
        assert len(whole.log_probs) == 400
        assert (len(chunks) > 2, chunks[-1].finish_reason) == (True, "length")


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_errors(server: LocalServer, protocol: str) -> None:
    url = server.grpc_url if protocol == "grpc" else server.http_url
    with Client(url, timeout=20, admin_key="x" * 20) as client:
        for error, message, call in (
            (InvalidRequestError, "top_p must be", lambda: client.generate("x", model="m", top_p=-1.0)),
            (NotFoundError, "unknown", lambda: client.generate("x", model="unknown")),
            (NotFoundError, "unknown", lambda: client.embed("x", model="unknown")),
            (NotFoundError, "serves no model for translation", lambda: client.translate("x")),
            (InvalidRequestError, "the model takes 96", lambda: client.embed("word " * 500, model="reader")),
            (ForbiddenError, "admin key", lambda: client.models()),
        ):
            with pytest.raises(error, match=message):
                call()
    if protocol == "http":
        with Client(url) as client:
            with pytest.raises(InvalidRequestError, match="bytes, and 3145728 are the most"):
                client.embed("x" * 2**22, model="reader")
            assert client.health().ready  # such a body would have ended it


def test_the_gRPC_port_is_no_HTTP(server: LocalServer) -> None:  # noqa: N802
    for url in (f"http://{server.grpc_url}", server.http_url.removeprefix("http://")):
        with Client(url, timeout=20) as client, pytest.raises(UnavailableError) as raised:
            client.generate("x", model="m")
        if url.startswith("http://"):
            assert "if it is the gRPC port, leave http:// out" in str(raised.value)


# Hang-ups


def running_slots(server: LocalServer) -> float:
    """How many slots are taken, by the server's metrics."""
    text = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
    values = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith("trident_requests_running")]
    assert values, text
    return sum(map(float, values))


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("how", ["close", "leave", "cancel"])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_an_abandoned_answer_frees_its_slot(server: LocalServer, protocol: str, how: str) -> None:
    url = server.grpc_url if protocol == "grpc" else server.http_url

    async def read(client: AsyncClient, begun: asyncio.Event) -> None:
        async for _ in client.stream(PROMPT, **LONG):
            begun.set()
            if how == "leave":
                break

    async def main() -> None:
        async with AsyncClient(url) as client:
            if how == "close":
                stream = client.stream(PROMPT, **LONG)
                await anext(stream)
                assert await asyncio.to_thread(until, lambda: running_slots(server) == 1)
                await stream.aclose()
            else:
                begun = asyncio.Event()
                task = asyncio.create_task(read(client, begun))
                await begun.wait()
                if how == "cancel":
                    assert await asyncio.to_thread(until, lambda: running_slots(server) == 1)
                    task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            assert await asyncio.to_thread(until, lambda: running_slots(server) == 0)

    asyncio.run(main())
    if how != "cancel":
        with Client(url) as client:
            blocking = client.stream(PROMPT, **LONG)
            next(blocking)
            assert until(lambda: running_slots(server) == 1)
            if how == "close":
                blocking.close()
            del blocking
            assert until(lambda: running_slots(server) == 0)


def test_a_whole_answer_that_nobody_wants_any_more(server: LocalServer) -> None:
    """Also over HTTP, where the server looks for hang-ups only between responses."""

    async def main(url: str) -> None:
        async with AsyncClient(url) as client:
            task = asyncio.create_task(client.generate(PROMPT, **LONG))
            assert await asyncio.to_thread(until, lambda: running_slots(server) == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert await asyncio.to_thread(until, lambda: running_slots(server) == 0)

    for url in (server.grpc_url, server.http_url):
        asyncio.run(main(url))


# Frozen servers and cut networks


@contextmanager
def frozen(server: LocalServer) -> Iterator[None]:
    """The server, and its launcher, which would start it again."""
    (triton,) = [pid for pid, line in children(server.launcher.pid).items() if "tritonserver" in line.split(" ")[0]]
    for pid in (server.launcher.pid, triton):
        os.kill(pid, signal.SIGSTOP)
    threads = list(Path(f"/proc/{triton}/task").glob("*/stat"))
    assert until(lambda: all(stat.read_text().rsplit(")", 1)[1].split()[0] == "T" for stat in threads))
    try:
        yield
    finally:
        for pid in (triton, server.launcher.pid):
            os.kill(pid, signal.SIGCONT)


class Relay:
    """Forwards connections to a port.

    Attributes:
        swallows: whether it loses everything instead.
        seen: what it has forwarded.
        secure: decrypts what callers send.
    """

    def __init__(self, port: int) -> None:
        self.swallows = False
        self.seen = b""
        self.secure: ssl.SSLContext | None = None
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def close(self) -> None:
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for each in self._open:
            each.close()

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                self._start(self._serve, self._listener.accept()[0])

    def _serve(self, caller: socket.socket) -> None:
        self._open.append(caller)
        if self.secure is not None:
            try:
                caller = self.secure.wrap_socket(caller, server_side=True)
            except OSError:
                return
            self._open.append(caller)
        server = socket.create_connection(("127.0.0.1", self._target))
        self._open.append(server)
        self._start(self._pump, caller, server)
        self._pump(server, caller)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self.seen += data
                if not self.swallows:
                    target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


LIMIT = 2.0  # seconds, of the clients below
CALLS: dict[str, Callable[[Any], Any]] = {
    "generate": lambda client: client.generate("x", model="m"),
    "embed": lambda client: client.embed(["x"] * 3, model="reader", batch_size=1),
    "search": lambda client: client.generate("x"),
    "unverified": lambda client: client.unverified("m"),
}
Ended = dict[str, tuple[BaseException | None, float]]


def every_blocking_call(url: str, begun: threading.Event, dead: threading.Event) -> Ended:
    """How calls of one client end that begin once the server is dead, and a stream that has begun before."""
    ended: Ended = {}

    def measure(name: str, call: Callable[[], Any]) -> None:
        began = time.monotonic()
        try:
            call()
        except Exception as error:
            ended[name] = error, time.monotonic() - began

    with Client(url, timeout=LIMIT) as client:
        stream = client.stream(PROMPT, **LONG)
        next(stream)
        begun.set()
        assert dead.wait(20)
        works = {name: lambda call=call: call(client) for name, call in CALLS.items()}
        works["stream"] = lambda: list(stream)
        threads = [threading.Thread(target=measure, args=each, daemon=True) for each in works.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(4 * LIMIT)
        return dict(ended)


async def every_awaited_call(url: str, begun: threading.Event, dead: threading.Event) -> Ended:
    """The same of the other client."""
    ended: Ended = {}

    async def measure(name: str, work: Any) -> None:
        began = time.monotonic()
        try:
            await work
        except Exception as error:
            ended[name] = error, time.monotonic() - began

    async def rest(stream: Any) -> None:
        async for _ in stream:
            pass

    async with AsyncClient(url, timeout=LIMIT) as client:
        stream = client.stream(PROMPT, **LONG)
        await anext(stream)
        begun.set()
        assert await asyncio.to_thread(dead.wait, 20)
        works = [measure(name, call(client)) for name, call in CALLS.items()]
        await asyncio.gather(measure("stream", rest(stream)), *works)
    return ended


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("cut", ["frozen", "network"])
def test_whoever_waits_for_a_dead_server_is_told_in_time(server: LocalServer, protocol: str, cut: str) -> None:
    relay = Relay(server.grpc_port if protocol == "grpc" else server.http_port)
    url = f"{'' if protocol == 'grpc' else 'http://'}127.0.0.1:{relay.port}"
    begun, dead = (threading.Event(), threading.Event()), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        blocking = pool.submit(every_blocking_call, url, begun[0], dead)
        awaited = pool.submit(lambda: asyncio.run(every_awaited_call(url, begun[1], dead)))
        assert all(each.wait(20) for each in begun)
        with frozen(server) if cut == "frozen" else nullcontext():
            relay.swallows = cut == "network"
            dead.set()
            found = {"blocking": blocking.result(), "awaited": awaited.result()}
    relay.close()
    for kind, ended in found.items():
        assert set(ended) == {"stream", *CALLS}, kind
        for name, (error, took) in ended.items():
            assert isinstance(error, DeadlineExceededError | UnavailableError), (kind, name, error)
            assert took < 2 * LIMIT, (kind, name, took, error)
    assert until(lambda: running_slots(server) == 0)


def test_a_dead_server_is_noticed_without_any_limit(server: LocalServer) -> None:
    """By gRPC's pings."""
    options: Any = {"timeout": None, "keepalive": 1}

    async def awaited(begun: threading.Event, dead: threading.Event) -> None:
        async with AsyncClient(server.grpc_url, **options) as client:
            stream = client.stream(PROMPT, **LONG)
            await anext(stream)
            begun.set()
            await asyncio.to_thread(dead.wait, 20)
            async for _ in stream:
                pass

    begun, dead = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool, Client(server.grpc_url, **options) as client:
        stream = client.stream(PROMPT, **LONG)
        next(stream)
        other = pool.submit(asyncio.run, awaited(begun, dead))
        assert begun.wait(20)
        with frozen(server):
            began = time.monotonic()
            dead.set()
            with pytest.raises(UnavailableError):
                list(stream)
            with pytest.raises(UnavailableError):
                other.result(20)
            assert time.monotonic() - began < 6


def test_several_servers_over_all_doors(server: LocalServer) -> None:
    dead = [f"{prefix}127.0.0.1:{port}" for prefix, port in zip(("http://", ""), local.free_ports(2), strict=True)]
    urls = [dead[0], server.http_url, dead[1], server.grpc_url]
    texts = ["a b c", "some longer text"] * 10

    async def awaited() -> Any:
        async with AsyncClient(urls) as client:
            chunks = [[chunk.text async for chunk in client.stream(PROMPT, model="m", max_tokens=8)] for _ in urls]
            return ["".join(each) for each in chunks], (await client.embed(texts, batch_size=2)).tolist()

    with Client(urls) as client, Client(server.grpc_url) as one:
        found = [client.generate(PROMPT, model="m", max_tokens=8).text for _ in urls]
        vectors = client.embed(texts, batch_size=2).tolist()
        assert found == [one.generate(PROMPT, model="m", max_tokens=8).text] * 4
        assert vectors == one.embed(texts, batch_size=2).tolist()
    assert asyncio.run(awaited()) == (found, vectors)


def test_headers_over_http(server: LocalServer) -> None:
    relay = Relay(server.http_port)
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    options: Any = {"headers": {"Traceparent": trace}, "api_key": "a-key", "admin_key": "another-key"}

    async def awaited() -> None:
        async with AsyncClient(f"http://127.0.0.1:{relay.port}", **options) as client:
            await client.generate(PROMPT, model="m", max_tokens=2)

    with Client(f"http://127.0.0.1:{relay.port}", **options) as client:
        for call in (lambda: client.generate(PROMPT, model="m", max_tokens=2), client.health):
            call()
            for line in (f"traceparent: {trace}", "authorization: Bearer a-key"):
                assert f"\r\n{line}\r\n".encode() in relay.seen
            assert b"another-key" not in relay.seen
            relay.seen = b""
        with pytest.raises(ForbiddenError):
            client.models()
        assert b"trident-admin-key: another-key\r\n" in relay.seen
        relay.seen = b""
        asyncio.run(awaited())
        assert trace.encode() in relay.seen
    relay.close()


# Encryption over HTTP


@contextmanager
def encrypted(port: int, context: ssl.SSLContext) -> Iterator[str]:
    """An HTTPS server before the HTTP port, as a proxy is; its name is "triton"."""
    relay = Relay(port)
    relay.secure = context
    try:
        yield f"https://127.0.0.1:{relay.port}"
    finally:
        relay.close()


@pytest.mark.parametrize("mutual", [False, True])
def test_https(server: LocalServer, certificates: Path, mutual: bool) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    if mutual:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(certificates / "ca.pem")
    own = {"certificate": certificates / "client.pem", "key": certificates / "client.key"}
    trusting = TLS(ca=certificates / "ca.pem", server_name="triton", **(own if mutual else {}))
    refused = [TLS(server_name="triton", **own), TLS(ca=certificates / "ca.pem", server_name="other", **own)]
    if mutual:
        refused.append(TLS(ca=certificates / "ca.pem", server_name="triton"))

    async def awaited(url: str, tls: TLS) -> str:
        async with AsyncClient(url, tls=tls, timeout=20) as client:
            return (await client.generate(PROMPT, model="m", max_tokens=4)).text

    with encrypted(server.http_port, context) as url, Client(server.grpc_url) as plain:
        expected = plain.generate(PROMPT, model="m", max_tokens=4).text
        assert asyncio.run(awaited(url, trusting)) == expected
        with Client(url, tls=trusting, timeout=20) as client:
            assert client.generate(PROMPT, model="m", max_tokens=4).text == expected
            assert client.health().ready
        for tls in refused:
            with pytest.raises(TridentError), Client(url, tls=tls, timeout=20) as client:
                client.generate(PROMPT, model="m", max_tokens=4)
            with pytest.raises(TridentError):
                asyncio.run(awaited(url, tls))


# What is left behind


def test_nothing_is_left_of_many_clients_over_http(server: LocalServer) -> None:
    def use() -> None:
        with Client(server.http_url) as client:
            client.embed("abc", model="reader")
            next(client.stream("one two", model="m", max_tokens=4))

    async def many(count: int) -> int:
        for _ in range(count):
            async with AsyncClient(server.http_url) as client:
                await client.embed("abc", model="reader")
                await anext(client.stream("one two", model="m", max_tokens=4))
        await asyncio.sleep(0.05)
        return len(asyncio.all_tasks())

    for _ in range(2):
        use()
        asyncio.run(many(1))
    before = left()
    for _ in range(25):
        use()
    assert asyncio.run(many(25)) == 1
    assert all(now <= was + 2 for was, now in zip(before, settled(before), strict=True)), (before, left())
