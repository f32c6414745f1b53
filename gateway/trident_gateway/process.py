"""The processes of a gateway: they listen, drain when they are told to end, and drop clients that are too slow."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
from types import FrameType
from typing import Any

import uvicorn
from prometheus_client.multiprocess import mark_process_dead
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from trident_gateway import app
from trident_gateway.gateway import Gateway
from trident_gateway.metrics import FOLDER
from trident_gateway.settings import Settings

logger = logging.getLogger(__name__)
_MAX_HEADER_BYTES = 64 * 1024
_PIPELINED = 16  # requests that a client may send before it has the answer to the first, and still be read
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
_TOO_LARGE = b"the request line and the headers are longer than %d bytes" % _MAX_HEADER_BYTES
_HEADERS_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(_TOO_LARGE), _TOO_LARGE)
)
_KEEP_ALIVE_SECONDS = 75
_BACKLOG = 2048
_LOOK_SECONDS = 1.0  # between two looks at the workers
_END_SECONDS = 10.0  # that a worker may take to end, beyond its grace


class Protocol(HttpToolsProtocol):
    """HTTP that waits neither for headers nor for a reader for longer than the settings say.

    Beyond that it mends three things of uvicorn's: a connection that has sent another request before it has its answer
    tells no longer that the client has gone; a request that would like to change to HTTP/2 loses its body; and headers
    behind a request that is being answered, or behind a body, may grow without end.
    """

    header_seconds = 30.0
    write_seconds = 30.0
    _headers: asyncio.TimerHandle | None = None
    _reader: asyncio.TimerHandle | None = None
    _in_body = False
    _other_bytes = 0  # in a row that are no body: request lines, headers, sizes of chunks, trailers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come: its headers are awaited."""
        super().connection_made(transport)
        self._unanswered: list[RequestResponseCycle] = []
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone: every request of its knows it, not only the latest."""
        for timer in (self._headers, self._reader):
            if timer is not None:
                timer.cancel()
        for cycle in self._unanswered:
            cycle.disconnected = not cycle.response_complete
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """More of a request."""
        if self._headers is None and (self.cycle is None or self.cycle.response_complete):
            self._await_headers()
        if not self._in_body and b"pgrade:" in data:
            data = _without_upgrade(data)
        self._other_bytes += len(data)
        super().data_received(data)
        if self._other_bytes > _MAX_HEADER_BYTES and not self.transport.is_closing():
            if not self._in_body and (self.cycle is None or self.cycle.response_complete):
                self.transport.write(_HEADERS_TOO_LARGE)
                self.transport.close()
            else:
                self.transport.abort()

    def on_headers_complete(self) -> None:
        """The headers are there; the body's time is the application's to mind."""
        self._headers_came()
        self._in_body = True
        super().on_headers_complete()
        self._unanswered = [cycle for cycle in self._unanswered if not cycle.response_complete]
        self._unanswered.append(self.cycle)
        if len(self._unanswered) <= _PIPELINED:
            self.flow.resume_reading()  # what is not read does not end either, so nobody would see that it has

    def on_body(self, body: bytes) -> None:
        """More of a body."""
        self._other_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is there."""
        self._other_bytes = 0
        self._in_body = False
        super().on_message_complete()
        if self.cycle.response_complete:  # the answer was quicker than the body; the next request has its time now
            self._headers_came()
            self._await_headers()

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        super().pause_writing()
        self._reader = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It has caught up."""
        if self._reader is not None:
            self._reader.cancel()
        super().resume_writing()

    def _await_headers(self) -> None:
        self._headers = self.loop.call_later(self.header_seconds, self.transport.abort)

    def _headers_came(self) -> None:
        if self._headers is not None:
            self._headers.cancel()
            self._headers = None


def _without_upgrade(data: bytes) -> bytes:
    """The same, but for a wish to go on in another protocol, which a server may overlook; the parser can't."""
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"\r\nx-upgrade:", head) + end + rest


class Server(uvicorn.Server):
    """A server that answers what it has begun before it ends; a second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal asks the process to end."""
        if self._loop is None or self._gateway.draining:
            super().handle_exit(sig, frame)
            return
        self._gateway.draining = True
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        await self._gateway.drain()
        self.should_exit = True


def config(settings: Settings, application: Any = None) -> uvicorn.Config:
    """How uvicorn runs."""
    protocol = type(
        "GatewayProtocol",
        (Protocol,),
        {"header_seconds": settings.body_seconds, "write_seconds": settings.write_seconds},
    )
    return uvicorn.Config(
        application,
        host=settings.host,
        port=settings.port,
        http=protocol,
        ws="none",
        lifespan="on",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=2,
        backlog=_BACKLOG,
    )


def run_worker(settings: Settings, sockets: list[socket.socket]) -> None:
    """Answer requests until a signal comes."""
    logging.basicConfig(level=logging.INFO, format="trident-gateway: %(message)s", stream=sys.stderr)
    gateway = Gateway(settings)
    Server(config(settings, app.create(gateway)), gateway).run(sockets=sockets)


def serve(settings: Settings) -> int:
    """Listen until a signal comes; the exit status.

    Raises:
        OSError: the port is taken.
    """
    _allow_connections()
    listening = _listen(settings)
    host, port = listening.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    print(f"trident-gateway: http://{address} for {', '.join(settings.triton)}", file=sys.stderr, flush=True)
    if settings.workers == 1:
        run_worker(settings, [listening])
        return 0
    folder = tempfile.mkdtemp(prefix="trident-gateway-")
    os.environ[FOLDER] = folder  # read where the metrics' library is imported, in the workers
    try:
        _supervise(settings, listening)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _supervise(settings: Settings, listening: socket.socket) -> None:
    """Keep the workers alive until a signal comes, then let them drain."""
    ending = threading.Event()
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda *_: ending.set())
    spawn = multiprocessing.get_context("spawn")

    def start() -> Any:
        worker = spawn.Process(target=run_worker, args=(settings, [listening]))
        worker.start()
        return worker

    workers = [start() for _ in range(settings.workers)]
    while not ending.wait(_LOOK_SECONDS):
        for place, worker in enumerate(workers):
            if not worker.is_alive():
                logger.error("worker %s ended with status %s: another one starts", worker.pid, worker.exitcode)
                mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]
                workers[place] = start()
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(settings.grace + _END_SECONDS)
        if worker.is_alive():
            worker.kill()


def _allow_connections() -> None:
    """Take as many open files as the system allows: each client is one, and the usual limit is 1,024."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _listen(settings: Settings) -> socket.socket:
    """The socket on which all processes listen."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
    except OSError:
        listening.close()
        raise
    listening.listen(_BACKLOG)
    listening.set_inheritable(True)
    return listening
