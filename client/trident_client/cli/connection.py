"""The flags that say which server is asked, and how; `Client` has an argument for each."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trident_client import TLS, Client, UnavailableError
from trident_client._settings import KEEPALIVE, SECONDS
from trident_client.cli import exits
from trident_client.cli.exits import InputError

URL = "TRIDENT_URL"
API_KEY = "TRIDENT_API_KEY"
DEFAULT_URL = "localhost:8001"


def add(parser: argparse.ArgumentParser, *, repeated: bool) -> None:
    """Add the flags to a parser.

    Args:
        repeated: they stand in the parser above as well, whose values hold where a flag isn't given again.
    """
    group = parser.add_argument_group("connection")

    def flag(*names: str, default: Any = None, **more: Any) -> Any:
        return group.add_argument(*names, default=argparse.SUPPRESS if repeated else default, **more)

    flag(
        "--url",
        action="append",
        dest="urls",
        metavar="ADDRESS",
        help="host:port of the gRPC endpoint, or grpcs://, http:// or https://; give it several times for several "
        f"servers (default ${URL}, or {DEFAULT_URL})",
    )
    flag(
        "--timeout",
        type=seconds,
        default=SECONDS,
        metavar="SECONDS",
        help="that the call may take; a streamed answer may take longer, but not be silent for so long; "
        f"none: no limit (default {SECONDS:g})",
    )
    flag("--api-key", metavar="KEY", help=f"for a proxy before the server; others see it in ps, but not ${API_KEY}")
    flag("--api-key-file", metavar="FILE", type=Path, help="the file that holds it")
    flag("--admin-key-file", metavar="FILE", type=Path, help="the file that holds the admin key ($TRIDENT_ADMIN_KEY)")
    flag("--header", action="append", dest="headers", type=header, metavar="NAME:VALUE", help="a header of every call")
    flag("--tls", action="store_true", help="encrypt the connection to an address without a scheme")
    flag("--ca", metavar="FILE", type=Path, help="certificates (PEM) that may sign the server's; with it --tls is set")
    flag("--cert", metavar="FILE", type=Path, help="this client's own certificate (PEM), for servers that ask for one")
    flag("--key", metavar="FILE", type=Path, help="its private key")
    flag("--server-name", metavar="NAME", help="the name in the server's certificate, where the address has another")
    flag("--max-message-bytes", type=int, metavar="BYTES", help="of one request and of one response")
    flag(
        "--keepalive",
        type=seconds,
        default=KEEPALIVE,
        metavar="SECONDS",
        help=f"of silence after which a gRPC connection is tested; none: never (default {KEEPALIVE:g})",
    )
    flag("--no-wait-if-full", action="store_true", help="fail at once where the server's queue is full")
    flag("--retries", type=int, default=0, metavar="N", help="send a request again whose answer breaks off (default 0)")
    flag(
        "--retry-silence",
        type=seconds,
        metavar="SECONDS",
        help="without anything of an answer after which it counts as broken off (default none)",
    )


def client(options: argparse.Namespace) -> Client:
    """The client that the flags describe.

    Raises:
        InputError: a flag makes no sense beside another.
        OSError: a file can't be read.
        ValueError: an address or a key is none.
        ModuleNotFoundError: an address needs the extra `http`.
    """
    return Client(**arguments(options))


def arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The same, as arguments of `Client` and `AsyncClient`."""
    if options.api_key and options.api_key_file:
        raise InputError("give --api-key or --api-key-file, not both")
    key = _read(options.api_key_file) if options.api_key_file else options.api_key
    return {
        "url": urls(options),
        "timeout": options.timeout,
        "api_key": key or os.environ.get(API_KEY) or None,
        "admin_key": _read(options.admin_key_file) if options.admin_key_file else None,
        "headers": dict(options.headers) if options.headers else None,
        "tls": _tls(options),
        "max_message_bytes": options.max_message_bytes,
        "keepalive": options.keepalive,
        "wait_if_full": not options.no_wait_if_full,
        "retries": options.retries,
        "retry_silence": options.retry_silence,
    }


@contextlib.contextmanager
def named(options: argparse.Namespace) -> Iterator[None]:
    """Name the server where a `with` block can't reach it."""
    try:
        yield
    except UnavailableError as error:
        found = exits.UNREACHABLE.search(str(error))
        if found is None:
            raise
        where = " and ".join(urls(options))
        raise UnavailableError(f"no server answers at {where} ({found[1]}): --url says where one is") from None


def urls(options: argparse.Namespace) -> list[str]:
    """The servers' addresses."""
    given = options.urls or [os.environ.get(URL) or DEFAULT_URL]
    return [url for each in given for url in re.split(r"[,\s]+", each.strip())]


def seconds(text: str) -> float | None:
    """A number of seconds; None for "none".

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    if text == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0, nor none")
    return value


def number(least: int) -> Callable[[str], int]:
    """The type of a flag whose value is a whole number, at least so large."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return value

    return read


def header(text: str) -> tuple[str, str]:
    """Name and value of "NAME:VALUE" or "NAME: VALUE".

    Raises:
        argparse.ArgumentTypeError: it is no such text; it isn't repeated, because it may be a secret.
    """
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise argparse.ArgumentTypeError("a header is given as NAME:VALUE")
    return name.strip(), value.strip()


def _tls(options: argparse.Namespace) -> TLS | bool:
    named = {
        "ca": options.ca,
        "certificate": options.cert,
        "key": options.key,
        "server_name": options.server_name,
    }
    if any(value is not None for value in named.values()):
        return TLS(**named)
    return bool(options.tls)


def _read(file: Path) -> str:
    """A key of a file.

    Raises:
        InputError: the file is empty, or no text.
    """
    try:
        key = file.read_text(encoding="ascii").strip()
    except UnicodeDecodeError:
        raise InputError(f"{file} holds no key: a key is printable ASCII") from None
    if not key:
        raise InputError(f"{file} is empty: it should hold a key")
    return key
