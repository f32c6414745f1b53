"""What the gateway notes of one request while it is answered: for the log, the metrics and the limits of its key."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from trident_gateway.keys import Key

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# W3C Trace Context, version 00: trace, parent, flags.
_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
HANGUP = 499  # no status of HTTP's: the client has gone before there was one


@dataclass
class Exchange:
    """One request and its answer.

    Attributes:
        request_id: the client's, or one of ours.
        method: HTTP's.
        route: the path as it is declared; "" where there is no such path, because a path may hold anything.
        client: the address of the other end.
        traceparent: the trace that the request belongs to, as the header has it.
        key: whose; None: nobody's.
        status: of the answer.
        model: that was asked, once it is known that there is one.
        stream: whether the answer is sent in parts.
        prompt_tokens: of the prompt, once known; `completion_tokens` of the answers.
        queue_seconds: that it waited in the gateway.
        first_byte_seconds: until the answer began.
        error: what the server, or the connection to it, said where there is no answer now.
        names: of the fields that the server calls otherwise than the caller does.
    """

    request_id: str
    method: str
    client: str | None
    traceparent: str | None = None
    route: str = ""
    key: Key | None = None
    status: int = HANGUP
    model: str | None = None
    stream: bool | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    queue_seconds: float | None = None
    first_byte_seconds: float | None = None
    error: str | None = None
    names: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, scope: Any) -> Exchange:
        """The exchange of an ASGI request that has just come."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"] if name in _WANTED}
        given = headers.get(b"x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        trace = headers.get(b"traceparent", "")
        client = scope.get("client")
        return cls(
            request_id,
            scope["method"] if scope["method"] in _METHODS else "OTHER",
            client[0] if client else None,
            trace if _TRACEPARENT.fullmatch(trace) else None,
        )

    @property
    def trace_id(self) -> str | None:
        """Of the trace that the request belongs to."""
        return None if self.traceparent is None else self.traceparent[3:35]

    def tokens(self, prompt: int, completion: int | None = None) -> None:
        """Note how many tokens the request took."""
        self.prompt_tokens = prompt
        self.completion_tokens = completion


_WANTED = (b"x-request-id", b"traceparent")
_METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE")
