"""A balancer whose answers break off: TCP, from a client to one real server, with faults where a test says."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

MARK = b"break-here"  # what a request must say to meet a fault


class Balancer:
    """Passes bytes on; a request with the mark meets the next fault, and none once all have happened.

    Attributes:
        port: that it listens at, on 127.0.0.1.
        connections: how many clients have come.
        marked: how many requests have had the mark.
    """

    def __init__(self, server_port: int) -> None:
        self.connections = self.marked = 0
        self._server_port = server_port
        self._faults: list[tuple[str, int]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def faults(self, *faults: tuple[str, int]) -> None:
        """What happens to the next requests with the mark.

        Args:
            faults: "cut" ends the connection, "freeze" passes nothing more on, each after so many bytes of the answer.
        """
        self._faults = list(faults)
        self.connections = self.marked = 0

    def cut(self) -> None:
        """End all connections now."""
        for each in self._open[1:]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                server = socket.create_connection(("127.0.0.1", self._server_port))
                self._open += [client, server]
                _Passage(self, client, server)

    def next_fault(self) -> tuple[str, int] | None:
        self.marked += 1
        return self._faults.pop(0) if self._faults else None


class _Passage:
    """One connection."""

    def __init__(self, balancer: Balancer, client: socket.socket, server: socket.socket) -> None:
        self._balancer, self._client, self._server = balancer, client, server
        self._fault: tuple[str, int] | None = None
        for work in (self._ask, self._answer):
            threading.Thread(target=work, daemon=True).start()

    def _ask(self) -> None:
        tail = b""
        with contextlib.suppress(OSError):
            while data := self._client.recv(65536):
                tail = tail[-len(MARK) + 1 :] + data
                if MARK in tail:
                    tail = b""
                    self._fault = self._balancer.next_fault() or self._fault
                self._server.sendall(data)
        self._end()

    def _answer(self) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := self._server.recv(65536):
                if self._fault is not None:
                    kind, after = self._fault
                    left = max(after - passed, 0)
                    passed += len(data)
                    if len(data) > left:
                        self._client.sendall(data[:left])
                        if kind == "cut":
                            break
                        return  # frozen: the connection stays, and nothing comes
                self._client.sendall(data)
        self._end()

    def _end(self) -> None:
        for each in (self._client, self._server):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def before(server_port: int) -> Iterator[Balancer]:
    """A balancer before a port of this machine."""
    made = Balancer(server_port)
    try:
        yield made
    finally:
        made.close()
