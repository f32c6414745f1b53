"""The servers behind a gateway: which of them answer, which models they have, and which is asked next.

A conversation goes to the server that had its beginning, whose cache then holds that, unless that server is much busier
than another. Which one it is follows from a hash (rendezvous hashing), so that every process of a gateway, and every
gateway, chooses the same without telling each other. A request moves on to another server only while nothing of its
answer was sent.

An address of the form `dns:NAME:PORT` stands for every address that the name has, as a headless service of Kubernetes
has one for each of its pods. It is looked up at each look, so servers come and go; one that goes ends its answers
first.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from trident_client import AsyncClient, NotFoundError, TridentError, UnavailableError
from trident_gateway.catalog import Model, catalog
from trident_gateway.errors import from_trident, refused

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
_BUSIER = 4  # requests that a server may have more than the least busy one, and still get what it knows
_LOOK_SECONDS = 5.0  # that a look at a server, or at a name, may take
DNS = "dns:"
_CONFIGS_EVERY = 15  # looks after which the configs are read again; a model may have been replaced


@dataclass
class Server:
    """One Triton server.

    Attributes:
        address: host and port of its gRPC endpoint.
        client: asks it.
        healthy: whether it answered when it was last asked.
        models: that it has, by name.
        running: requests of this process that it has.
    """

    address: str
    client: AsyncClient
    healthy: bool = False
    models: Mapping[str, Model] = field(default_factory=dict)
    running: int = 0
    looks: int = 0
    names: tuple[str, ...] = ()


async def resolved(name: str) -> list[str]:
    """The addresses that a name has now, each with its port.

    Args:
        name: host and port.

    Raises:
        OSError: it has none, or nobody can say.
    """
    host, _, port = name.rpartition(":")
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(_LOOK_SECONDS):
        found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    plain = {str(each[4][0]) for each in found}
    return sorted(f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in plain)


class Servers:
    """All servers of a gateway.

    Args:
        addresses: host and port of each, or `dns:` before a name that has several.
        connect: makes a client for an address.
        seconds: between two looks at each.
        told: is called with a server after each look at it.
        gone: is called with an address that is no server any more.
        resolve: finds the addresses of a name.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        connect: Callable[[str], AsyncClient],
        seconds: float,
        told: Callable[[Server], None] = lambda _: None,
        resolve: Callable[[str], Awaitable[list[str]]] = resolved,
        gone: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._connect = connect
        self._seconds = seconds
        self._told = told
        self._gone = gone
        self._resolve = resolve
        self._found: dict[str, set[str]] = {
            address.removeprefix(DNS): set() for address in addresses if address.startswith(DNS)
        }
        self._fixed = {address for address in addresses if not address.startswith(DNS)}
        self.every = [Server(address, connect(address)) for address in addresses if address in self._fixed]
        self._leaving: list[Server] = []
        self._watcher: asyncio.Task[None] | None = None
        self._looks: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Look at every server once, and go on in the background."""
        await self.look_again()
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Look no more, and close the connections."""
        tasks = [*self._looks.values(), *([self._watcher] if self._watcher else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(server.client.close() for server in (*self.every, *self._leaving)))

    @property
    def ready(self) -> bool:
        """Whether a server with a model answers."""
        return any(server.healthy and server.models for server in self.every)

    def models(self) -> dict[str, Model]:
        """The models of all healthy servers, by name."""
        found: dict[str, Model] = {}
        for server in self.every:
            if server.healthy:
                found = {**server.models, **found}
        return dict(sorted(found.items()))

    def having(self, model: str) -> list[Server]:
        """The healthy servers that have a model."""
        return [server for server in self.every if server.healthy and model in server.models]

    def order(self, model: str, beginning: bytes) -> list[Server]:
        """The servers that have a model, the one to ask first.

        Args:
            beginning: of a conversation; b"": it does not matter which one answers.
        """
        found = sorted(self.having(model), key=lambda server: server.running)
        if beginning and len(found) > 1:
            home = max(found, key=lambda server: _rank(server.address, beginning))
            if home.running <= found[0].running + _BUSIER:
                found.remove(home)
                found.insert(0, home)
        return found

    async def look_again(self) -> None:
        """Ask every name and every server now: a model may have been loaded since the last look."""
        await self._find()
        await asyncio.gather(*(self._look(server) for server in self.every))

    async def call(self, model: str, beginning: bytes, ask: Callable[[AsyncClient], Awaitable[Result]]) -> Result:
        """An answer in one, from the first server that can be reached.

        Raises:
            ApiError: none can, or the server refuses the request or fails.
        """

        async def one(client: AsyncClient) -> AsyncGenerator[Result, None]:
            yield await ask(client)

        async with contextlib.aclosing(self.stream(model, beginning, one)) as answers:
            return await anext(answers)

    async def stream(
        self, model: str, beginning: bytes, ask: Callable[[AsyncClient], AsyncGenerator[Result, None]]
    ) -> AsyncGenerator[Result, None]:
        """An answer in parts, from the first server that can be reached; closing it cancels the request.

        Raises:
            ApiError: as `call`.
        """
        servers = self.order(model, beginning)
        failure: TridentError = UnavailableError("no server has the model now")
        for server in servers:
            begun = False
            server.running += 1
            try:
                async with contextlib.aclosing(ask(server.client)) as parts:
                    async for part in parts:
                        begun = True
                        yield part
                return
            except UnavailableError as error:
                if begun:
                    raise from_trident(error) from None
                failure = error
            except TridentError as error:
                raise from_trident(error) from None
            except (TypeError, ValueError) as error:  # of the client: a number that fits no tensor
                raise refused(str(error)) from None
            finally:
                server.running -= 1
        raise from_trident(failure)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            await self._find()
            # A server that is slow to answer keeps no other from being looked at.
            self._looks = {address: look for address, look in self._looks.items() if not look.done()}
            for server in self.every:
                if server.address not in self._looks:
                    self._looks[server.address] = asyncio.create_task(self._look(server))

    async def _find(self) -> None:
        """Look the names up: servers that are new are looked at, those that are gone get nothing more."""
        if not self._found:
            return
        await asyncio.gather(*(self._look_up(name) for name in self._found))
        wanted = self._fixed.union(*self._found.values())
        for server in [server for server in self.every if server.address not in wanted]:
            self.every.remove(server)
            self._leaving.append(server)
            self._gone(server.address)
        for address in sorted(wanted - {server.address for server in self.every}):
            self.every.append(Server(address, self._connect(address)))
        for server in [server for server in self._leaving if not server.running]:
            self._leaving.remove(server)
            await server.client.close()

    async def _look_up(self, name: str) -> None:
        try:
            self._found[name] = set(await self._resolve(name))
        except (OSError, TimeoutError) as error:  # what it had is kept: whether it answers is seen by asking it
            logger.warning("%s can't be looked up: %s", name, error)

    async def _look(self, server: Server) -> None:
        """Ask a server which models it has."""
        try:
            names = tuple(sorted(await server.client.served(timeout=_LOOK_SECONDS)))
            if names != server.names or server.looks % _CONFIGS_EVERY == 0:
                parameters = {}
                for name in names:
                    # Of a model that is being unloaded Triton says either; the server answers, and has others.
                    with contextlib.suppress(NotFoundError, UnavailableError):
                        parameters[name] = await server.client.parameters(name, timeout=_LOOK_SECONDS)
                if names and not parameters:
                    raise UnavailableError("none of its models answers")
                server.models, server.names = catalog(parameters), tuple(parameters)
            server.looks += 1
            healthy = True
        except TridentError as error:
            if server.healthy:
                logger.warning("%s does not answer: %s", server.address, type(error).__name__)
            healthy = False
        server.healthy = healthy
        if server in self.every:
            self._told(server)


def _rank(address: str, beginning: bytes) -> bytes:
    return hashlib.blake2b(beginning, digest_size=8, key=address.encode()[:64]).digest()


def beginning_of(parts: Sequence[str]) -> bytes:
    """What of a conversation says where it belongs: its first texts, up to a length that a later turn still has."""
    return "\0".join(part[:512] for part in parts[:2]).encode("utf-8", "surrogatepass")
