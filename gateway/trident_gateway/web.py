"""GET /, a page on which a person tries the models, and the files that it consists of.

The page asks the endpoints as any other client does, so it holds no secret and needs no key itself.
"""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

from trident_gateway.errors import ApiError

router = APIRouter(include_in_schema=False)
FOLDER = "/page/"
_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# A model's answer may say anything: nothing runs but our own files, which can only ask this gateway and make no HTML
# of texts, and no other page may frame this one.
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
_HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "cache-control": "no-cache",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def _read() -> dict[str, tuple[bytes, str]]:
    """Content and type of each file, by name."""
    found = {}
    for file in resources.files("trident_gateway").joinpath("page").iterdir():
        kind = _TYPES.get(file.name.rpartition(".")[2])
        if kind is not None:
            found[file.name] = file.read_bytes(), kind
    return found


_FILES = _read()


@router.get("/")
async def index() -> Response:
    """The page."""
    return _served("index.html")


@router.get(FOLDER + "{name}")
async def part(name: str) -> Response:
    """A file of the page."""
    return _served(name)


def _served(name: str) -> Response:
    if name not in _FILES:
        raise ApiError(404, "the page has no such file")
    content, kind = _FILES[name]
    return Response(content, headers={**_HEADERS, "content-type": kind})
