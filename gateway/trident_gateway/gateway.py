"""What every handler needs: the settings, the servers, the queues, the keys, the log and the metrics of one process."""

from __future__ import annotations

import asyncio
import time

from fastapi import Request

from trident_client import AsyncClient
from trident_gateway import tracing
from trident_gateway.admission import Admission
from trident_gateway.catalog import Model, find
from trident_gateway.errors import ApiError, invalid, model_not_found
from trident_gateway.exchange import Exchange
from trident_gateway.keys import KeyRing
from trident_gateway.logs import AccessLog
from trident_gateway.metrics import Metrics
from trident_gateway.routing import Server, Servers
from trident_gateway.settings import Settings
from trident_gateway.tracing import Tracing

EXCHANGE = "trident.exchange"  # of an ASGI scope
_POLL_SECONDS = 0.05
_LOOK_PAUSE = 1.0


class Gateway:
    """The state of one process.

    Attributes:
        draining: whether new requests are refused, because the process is about to end.
        open: requests that are being answered, the waiting ones too.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keys = KeyRing(settings.keys)
        self.admission = Admission(settings.max_waiting, settings.queue_seconds)
        self.metrics = Metrics()
        self.log = AccessLog() if settings.access_log else AccessLog(None)
        self.draining = False
        self.open = 0
        self.tracing = Tracing.configured()
        self.servers = Servers(
            settings.triton,
            lambda address: AsyncClient(address, timeout=settings.timeout, headers=tracing.headers),
            settings.health_seconds,
            self._looked,
            gone=self.metrics.forget,
        )
        self._next_look = 0.0

    async def start(self) -> None:
        """Look at the servers; a server that is not there yet is found later."""
        await self.servers.start()

    async def stop(self) -> None:
        """Close the connections."""
        await self.servers.stop()

    def _looked(self, server: Server) -> None:
        verified = {name: model.verified for name, model in server.models.items()}
        self.metrics.server(server.address, healthy=server.healthy, verified=verified)

    async def drain(self) -> None:
        """Refuse new requests, and wait until the running ones are answered, but not longer than the settings say."""
        self.draining = True
        until = time.monotonic() + self.settings.grace
        while self.open and time.monotonic() < until:
            await asyncio.sleep(_POLL_SECONDS)

    async def model(self, name: str, *tasks: str, param: str = "model") -> Model:
        """The model that a request names.

        Args:
            name: a model's, `<model>:<adapter>`, an alias, or a name with Ollama's ":latest"; "": the only one of the
                tasks.
            tasks: one of which it must have; (): any.

        Raises:
            ApiError: there is none of that name, or it can't do that.
        """
        name = self.settings.aliases.get(name, name).removesuffix(":latest")
        name = self.settings.aliases.get(name, name)
        known = self.servers.models()
        if find(known, name) is None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_PAUSE
            await self.servers.look_again()
            known = self.servers.models()
        if not any(server.healthy for server in self.servers.every):
            raise ApiError(503, "no server answers: try again later", code="unavailable", retry_after=2)
        if not name:
            return _only(known, tasks, param)
        found = find(known, name)
        if found is None:
            raise model_not_found(name, ", ".join(known) or "none")
        if tasks and found.task not in tasks:
            fitting = [each.name for each in known.values() if each.task in tasks]
            raise invalid(
                f"the model {name!r} is for {found.task}, not for {' or '.join(tasks)}; "
                f"for that there is {', '.join(fitting) or 'no model here'}",
                param,
                code="model_not_suitable",
            )
        return found


def _only(known: dict[str, Model], tasks: tuple[str, ...], param: str) -> Model:
    """The default variant of the only model of some tasks."""
    fitting = [model for model in known.values() if model.task in tasks and "_" not in model.name]
    if len(fitting) != 1:
        names = ", ".join(model.name for model in fitting) or "none"
        raise invalid(f"name a model for {' or '.join(tasks)}: there is {names}", param)
    return fitting[0]


def gateway_of(request: Request) -> Gateway:
    """The state of the process that answers a request."""
    found: Gateway = request.app.state.gateway
    return found


def exchange_of(request: Request) -> Exchange:
    """What is noted of a request."""
    found: Exchange = request.scope[EXCHANGE]
    return found
