"""What every request passes: its id, its key, the checks that need no body, the limits of its body, and the log."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trident_gateway import web
from trident_gateway.errors import ApiError, ClientGone, defect
from trident_gateway.exchange import Exchange
from trident_gateway.gateway import EXCHANGE, Gateway
from trident_gateway.keys import ADMIN, INFERENCE, Key
from trident_gateway.settings import LOOPBACK, MEBIBYTE

logger = logging.getLogger(__name__)
FREE = ("/", "/health", "/ready")
AUDIO_PATHS = "/v1/audio/"
_ADMIN_PATHS = ("/metrics", "/admin/")
_KEY_HEADERS = ("x-api-key", "api-key")
_KEY_NAMES = {"key", "api_key", "api-key", "apikey", "token", "access_token"}
# A client that sends a body beyond the limit reads no answer before it has sent all of it.
_DISCARDED_BYTES = 256 * MEBIBYTE
_DISCARD_SECONDS = 10.0


class Door:
    """The outermost part of the application."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        exchange = scope[EXCHANGE] = Exchange.of(scope)
        answer = _Answer(exchange, send)
        self._gateway.open += 1
        try:
            with self._gateway.tracing.request(exchange):
                await self._answer(scope, receive, answer, exchange)
        finally:
            self._gateway.open -= 1
            seconds = time.perf_counter() - exchange.began
            self._gateway.metrics.over(exchange, seconds)
            self._gateway.log.write(exchange, seconds)

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer, exchange: Exchange) -> None:
        """Answer a request, whatever becomes of it."""
        try:
            settings = self._gateway.settings
            limit = settings.max_audio_bytes if scope["path"].startswith(AUDIO_PATHS) else settings.max_body_bytes
            body = _Body(receive, Headers(scope=scope), self._gateway, limit)
            self._check(scope, exchange)
            await body.check()
            await self._app(scope, body.receive, answer.send)
        except ApiError as error:
            await answer.refuse(error, scope["path"])
        except ClientGone:
            pass
        except Exception as error:
            # The frames say where; the message may hold what the request said.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s: a request failed by %s:\n%s", exchange.request_id, type(error).__name__, frames)
            await answer.refuse(defect(), scope["path"])
        finally:
            exchange.route = getattr(scope.get("route"), "path", "")

    def _check(self, scope: Scope, exchange: Exchange) -> None:
        """Refuse what needs no look at the body.

        Raises:
            ApiError: the request has two hosts, comes from another page, has its key in its address, has none, or comes
                too late.
        """
        headers = Headers(scope=scope)
        if len(headers.getlist("host")) > 1:  # of which a proxy may have looked at the other one (RFC 9112, 3.2)
            raise ApiError(400, "a request has one Host header, and this one has more", code="several_hosts")
        self._check_origin(headers)
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if any(name.lower() in _KEY_NAMES for name, _ in query):
            raise ApiError(
                400,
                "a key belongs into the header Authorization: Bearer ..., never into the address, which logs keep",
                code="key_in_address",
            )
        if scope["path"] in FREE or scope["path"].startswith(web.FOLDER) or scope["method"] == "OPTIONS":
            return
        if not self._gateway.keys.open:
            exchange.key = self._key(headers)
            wanted = ADMIN if scope["path"].startswith(_ADMIN_PATHS) else INFERENCE
            if wanted not in exchange.key.scopes:
                raise ApiError(403, f"this key has no scope {wanted}", code="insufficient_scope")
        if self._gateway.draining:
            raise ApiError(
                503,
                "the gateway ends and takes no new requests: try again",
                code="draining",
                retry_after=1,
                headers={"connection": "close"},
            )

    def _key(self, headers: Headers) -> Key:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if given and scheme.lower() != "bearer":
            given = ""
        found = given.strip() or next((headers[name] for name in _KEY_HEADERS if name in headers), "")
        challenge = {"www-authenticate": "Bearer"}
        if not found:
            message = "no API key: send it as Authorization: Bearer KEY"
            raise ApiError(401, message, code="missing_api_key", headers=challenge)
        key = self._gateway.keys.find(found)
        if key is None:
            raise ApiError(401, "the API key is not known", code="invalid_api_key", headers=challenge)
        return key

    def _check_origin(self, headers: Headers) -> None:
        """Refuse a page of another site, which a browser of this machine would let in without a key.

        A page may also have given its own name our address; so, without keys, only names of this machine are ours.
        """
        settings = self._gateway.settings
        origin, host = headers.get("origin"), headers.get("host", "")
        if origin is not None and origin not in settings.cors_origins and _place(origin)[0] != host:
            raise ApiError(403, "pages of this origin may not ask: see --cors-origin", code="origin_not_allowed")
        _, name = _place(f"//{host}")
        if self._gateway.keys.open and not settings.public and name not in (*LOOPBACK, settings.host):
            raise ApiError(403, "the Host header is none of this machine's names", code="host_not_allowed")


def _place(address: str) -> tuple[str, str]:
    """Host with port, and host, of an address; "" of one that is none."""
    try:
        found = urlsplit(address)
        return found.netloc, found.hostname or ""
    except ValueError:
        return "", ""


class _Body:
    """A request's body, which may only be so long, and must arrive in time."""

    def __init__(self, receive: Receive, headers: Headers, gateway: Gateway, limit: int) -> None:
        self._receive = receive
        self._headers = headers
        self._limit = limit
        self._until = asyncio.get_running_loop().time() + gateway.settings.body_seconds
        self._size = 0
        self._complete = False

    async def check(self) -> None:
        """Refuse a body that says it is too long."""
        length = self._headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._limit:
            if self._headers.get("expect", "").lower() != "100-continue":
                await self._discard()
            raise self._too_long()

    async def receive(self) -> Message:
        """The next part."""
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(
                408, "the body did not arrive in time", code="timeout", headers={"connection": "close"}
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._size > self._limit:
            await self._discard()
            raise self._too_long()
        return message

    def _too_long(self) -> ApiError:
        return ApiError(
            413,
            f"the body is longer than {self._limit} bytes",
            code="request_too_large",
            headers={"connection": "close"},
        )

    async def _discard(self) -> None:
        """Read on and forget it, for a while."""
        try:
            async with asyncio.timeout(_DISCARD_SECONDS):
                while not self._complete and self._size < _DISCARDED_BYTES:
                    message = await self._receive()
                    self._size += len(message.get("body", b""))
                    self._complete = not message.get("more_body", False)
        except TimeoutError:
            pass


class _Answer:
    """Notes when a response begins, and with which status."""

    def __init__(self, exchange: Exchange, send: Send) -> None:
        self._exchange = exchange
        self._send = send
        self._begun = False

    async def send(self, message: Message) -> None:
        """Send a part of the response."""
        if message["type"] == "http.response.start":
            self._begun = True
            self._exchange.status = message["status"]
            self._exchange.first_byte_seconds = time.perf_counter() - self._exchange.began
            MutableHeaders(scope=message)["x-request-id"] = self._exchange.request_id
        await self._send(message)

    async def refuse(self, error: ApiError, path: str) -> None:
        """Send an error, unless the response has begun."""
        if self._begun:
            return
        content = json.dumps(error.body(path)).encode()
        headers: Mapping[str, Any] = {
            "content-type": "application/json",
            "content-length": str(len(content)),
            **error.headers,
        }
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": content})
