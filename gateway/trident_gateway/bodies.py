"""A request's body: JSON, read into a model of pydantic, or a refusal that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from trident_gateway.errors import ApiError, invalid

_KIND = "kind"  # of a dependency that reads a body
Neutral = Any  # the type of a field that changes no answer, and is not looked at


class Body(BaseModel):
    """A body whose fields are all known: an unknown one is refused, because it may be what the caller counts on."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


BodyT = TypeVar("BodyT", bound=BaseModel)


def read(kind: type[BodyT]) -> Callable[[Request], Awaitable[BodyT]]:
    """A dependency that gives a request's body.

    Raises, when it is called:
        ApiError: the body is no JSON in UTF-8, nests too deeply, or does not fit; the sentence names the field.
    """

    async def body(request: Request) -> BodyT:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            found = f"found {media_type[:80]!r}" if media_type else "found none"
            raise ApiError(415, f"the Content-Type must be application/json, {found}", code="unsupported_media_type")
        content = await request.body()
        if not content:
            raise invalid("the body is empty: it must be a JSON object")
        try:
            given = from_json(content, allow_inf_nan=False)
        except ValueError as error:
            raise invalid(f"the body is no JSON: {error}", code="invalid_json") from None
        if not isinstance(given, dict):
            raise invalid("the body must be a JSON object")
        try:
            return kind.model_validate(given)
        except ValidationError as error:
            raise refusal(error, kind) from None

    setattr(body, _KIND, kind)
    return body


def describe(app: FastAPI, routers: Iterable[APIRouter]) -> dict[str, Any]:
    """The schema of an application, with the bodies that `read` reads in the endpoints of its routers."""
    schema: dict[str, Any] = get_openapi(title=app.title, version=app.version, routes=app.routes)
    shared = schema.setdefault("components", {}).setdefault("schemas", {})
    for route in (route for router in routers for route in router.routes if isinstance(route, APIRoute)):
        for dependency in route.dependant.dependencies:
            kind = getattr(dependency.call, _KIND, None)
            if kind is not None:
                body = kind.model_json_schema(ref_template="#/components/schemas/{model}")
                shared |= body.pop("$defs", {})
                operation = schema["paths"][route.path]["post"]
                operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return schema


def refusal(error: ValidationError, kind: type[BaseModel]) -> ApiError:
    """The first thing that is wrong; of a union, what is wrong with each of its kinds, if they agree on nothing."""
    found = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in found["loc"] if not _is_type(part, kind)) or "the body"
    param = str(found["loc"][0])[:160] if found["loc"] else None
    if found["type"] == "extra_forbidden":
        return invalid(f"{place[:160]} is not known here", param, code="unknown_parameter")
    if found["type"] == "missing":
        return invalid(f"{place} is missing", param, code="missing_required_parameter")
    return invalid(f"{place}: {found['msg'].removeprefix('Value error, ')}", param, code="invalid_value")


def _is_type(part: int | str, kind: type[BaseModel]) -> bool:
    """Whether a part of a place is the name of a type in a union, as pydantic puts it there."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or "[" in part or part[:1].isupper())
