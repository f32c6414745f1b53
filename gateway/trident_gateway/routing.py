"""The servers behind a gateway: which of them answer, which models they have, and which is asked next.

A conversation goes to the server that had its beginning, whose cache then holds that, unless that server is much busier
than another. Which one it is follows from a hash (rendezvous hashing), so that every process of a gateway, and every
gateway, chooses the same without telling each other. A request moves on to another server only while nothing of its
answer was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from trident_client import AsyncClient, NotFoundError, TridentError, UnavailableError
from trident_gateway.catalog import Model, catalog
from trident_gateway.errors import from_trident, refused

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
_BUSIER = 4  # requests that a server may have more than the least busy one, and still get what it knows
_LOOK_SECONDS = 5.0  # that a look at a server may take
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


class Servers:
    """All servers of a gateway.

    Args:
        clients: by address.
        seconds: between two looks at each.
        told: is called with a server after each look at it.
    """

    def __init__(
        self, clients: Mapping[str, AsyncClient], seconds: float, told: Callable[[Server], None] = lambda _: None
    ) -> None:
        self.every = [Server(address, client) for address, client in clients.items()]
        self._seconds = seconds
        self._told = told
        self._watchers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Look at every server once, and go on in the background."""
        await asyncio.gather(*(self._look(server) for server in self.every))
        self._watchers = [asyncio.create_task(self._watch(server)) for server in self.every]

    async def stop(self) -> None:
        """Look no more, and close the connections."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await asyncio.gather(*(server.client.close() for server in self.every))

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
        """Ask every server now: a model may have been loaded since the last look."""
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

    async def _watch(self, server: Server) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            await self._look(server)

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
        self._told(server)


def _rank(address: str, beginning: bytes) -> bytes:
    return hashlib.blake2b(beginning, digest_size=8, key=address.encode()[:64]).digest()


def beginning_of(parts: Sequence[str]) -> bytes:
    """What of a conversation says where it belongs: its first texts, up to a length that a later turn still has."""
    return "\0".join(part[:512] for part in parts[:2]).encode("utf-8", "surrogatepass")
