"""What the gateway answers when it can't do what it is asked, in the form that each kind of client reads.

A handler raises `ApiError`; the client's own errors become one in `from_trident`. The form follows from the path:
OpenAI's, Cohere's, TEI's or Ollama's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trident_client import (
    CancelledError,
    DeadlineExceededError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    TridentError,
    UnavailableError,
)

# Beginnings of what the server's messages say of a field: "temperature must be ...", "max_tokens is 5000, but ...",
# "messages[0].content[1] is an image ...".
_FIELD = re.compile(r"([a-z][a-z0-9_]*)(?:\[\d+\](?:\.[a-z_]+)?)* (?:must|is|has|holds|names|needs|admits)\b")
_TOO_LONG = re.compile(r"ha(?:s|ve) \d+ (?:tokens|bytes).*(?:context|the model takes)|tokens leave room for")
_CONTEXT = re.compile(r"(?:context (?:of|is)|the model takes) (\d+)")
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_UNKNOWN = re.compile(r"unexpected inference input '(\w+)' for model '([^']*)'")  # Triton's own
_ENSEMBLE = re.compile(r"in ensemble '[^']*', ")  # Triton's own, of models with stages
# Why a server that can be reached has no answer now: the guard's sentence, that of a task which another model answers,
# and what the launcher, Triton and this gateway say of a model that is unloaded or being loaded.
_GUARD = re.compile(r"the guard's rule (.{1,100}?) could not be checked")
_ASKED = re.compile(r"which answers for this model, is not ready")
_AWAY = re.compile(r"the model (?:is not |was un)loaded|Stub process|no available versions|no server has the model")
_ENCODERS_NAMES = {"text_input": "input"}
_OPENAI_NAMES = {"text_input": "prompt", "input_ids": "prompt", "stop_words": "stop", "random_seed": "seed"}


class ApiError(Exception):
    """A refusal or a failure, as HTTP has it.

    Args:
        status: HTTP's.
        message: for a person.
        code: for a program, OpenAI's where it has one.
        param: the field that is wrong.
        retry_after: seconds after which another try may succeed.
        headers: more of the response's.
        cause: the server's own sentence where the message says less, for the log.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
        cause: str | None = None,
    ) -> None:
        super().__init__(message)
        self.cause = cause
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)

    @property
    def type(self) -> str:
        """OpenAI's word for the kind of error."""
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def renamed(self, names: Mapping[str, str]) -> ApiError:
        """The same in the caller's words.

        Args:
            names: of fields, as the server calls them and as the caller does.
        """
        ours = self.param or self.message.partition(" ")[0]
        if (name := names.get(ours)) is None:
            return self
        message = name + self.message.removeprefix(ours) if self.message.startswith(f"{ours} ") else self.message
        found = ApiError(self.status, message, code=self.code, param=name)
        found.headers = self.headers
        return found

    def openai(self) -> dict[str, Any]:
        """The body that OpenAI's clients read."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def body(self, path: str) -> dict[str, Any]:
        """The body that the clients of a path read."""
        if path.startswith("/api/"):
            return {"error": self.message}
        if path.startswith("/v2/"):
            return {"message": self.message}
        if path in ("/embed", "/rerank", "/predict"):
            kinds = {413: "validation", 424: "backend", 429: "overloaded"}
            kind = kinds.get(self.status, "validation" if self.status < 500 else "backend")
            return {"error": self.message, "error_type": kind}
        return self.openai()


class ClientGone(Exception):
    """The client has hung up: nobody reads an answer."""


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that can never succeed."""
    return ApiError(400, message, param=param, code=code)


def model_not_found(model: str, known: str) -> ApiError:
    """A name that no model has."""
    return ApiError(
        404, f"the model {model[:80]!r} does not exist; there are {known}", code="model_not_found", param="model"
    )


def defect() -> ApiError:
    """What nobody but us can mend."""
    return ApiError(500, "the gateway failed; its log says why", code="server_error")


def overloaded(message: str, seconds: int) -> ApiError:
    """No room now."""
    return ApiError(429, message, code="rate_limit_exceeded", retry_after=seconds)


def refused(message: str) -> ApiError:
    """What the server, or its client, says of a request that can never succeed."""
    inner = _ENSEMBLE.sub("", message)
    if unknown := _UNKNOWN.search(inner):
        return ApiError(400, f"the model {unknown[2]!r} knows no {unknown[1]}: leave it out", param=unknown[1])
    field = _FIELD.match(inner)
    names = _OPENAI_NAMES if inner == message else _ENCODERS_NAMES
    param = None if field is None else names.get(field[1], field[1])
    if not _TOO_LONG.search(inner):
        return ApiError(400, inner, param=param)
    # OpenAI's words, by which libraries know this error.
    context = _CONTEXT.search(inner)
    told = f"This model's maximum context length is {context[1]} tokens: {inner}" if context else inner
    return ApiError(400, told, code="context_length_exceeded", param=param)


def _unavailable(message: str) -> str:
    """Why there is no answer now, in a sentence that names no server and no model that the caller did not ask.

    Args:
        message: the server's, or of the connection to it.
    """
    if guard := _GUARD.search(message):
        return (
            f"the guard's rule {guard[1]} could not be checked, so the model does not answer: try again later, or tell "
            "whoever runs this gateway, whose log says why"
        )
    if _ASKED.search(message):
        return "another model, which answers for this one, is not ready: try again later"
    if _AWAY.search(message):
        return "the model is not loaded now: try again later"
    return "the server can't be reached, or ends: try again later"


def from_trident(error: TridentError) -> ApiError:
    """The answer to a request that the server refuses or that fails there."""
    message = str(error)
    if isinstance(error, InvalidRequestError):
        return refused(message)
    if isinstance(error, NotFoundError):
        return ApiError(404, message, code="model_not_found", param="model")
    if isinstance(error, OverloadedError) and not _GUARD.search(message):
        return overloaded(message, 1)
    if isinstance(error, UnavailableError):
        return ApiError(503, _unavailable(message), code="unavailable", retry_after=2, cause=message)
    if isinstance(error, DeadlineExceededError):
        return ApiError(504, "the answer took longer than this gateway allows", code="timeout")
    if isinstance(error, CancelledError):
        return ApiError(503, "the server gave the request up: try again", code="cancelled", retry_after=1)
    return ApiError(500, "the server failed; its log says why", code="server_error")
