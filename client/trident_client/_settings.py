"""How a client reaches its servers: addresses, keys, certificates, headers and limits."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trident_client import _admin_key
from trident_client._errors import ForbiddenError

SECONDS = 60.0  # that a call may take where nobody says otherwise
KEEPALIVE = 20.0  # seconds of silence until a connection is tested, and then until its calls are given up

Headers = Mapping[str, str]

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
# Names of gRPC's own resolvers, which also have forms without "//".
_RESOLVERS = ("dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds")
# The names that both gRPC and HTTP take.
_NAME = re.compile(r"[0-9a-z_.-]+")


@dataclass(frozen=True)
class TLS:
    """How a connection is encrypted.

    Attributes:
        ca: file of the certificates (PEM) that may sign the server's; None: those of the system.
        certificate: file of this client's own certificate (PEM), for servers that ask for one.
        key: file of its private key.
        server_name: the name that the server's certificate has, where it is not that of the address.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a client's certificate and its key belong together: give both, or neither")


@dataclass(frozen=True)
class Address:
    """One server.

    Attributes:
        protocol: which of its ports it is.
        target: for gRPC, its target; for HTTP, the URL before "/v2".
        secure: whether the connection is encrypted.
    """

    protocol: Literal["grpc", "http"]
    target: str
    secure: bool

    @classmethod
    def parse(cls, url: str, secure: bool) -> Address:
        """Read "host:port", "grpc://host:port", "http://host:port" or their encrypted forms.

        Args:
            secure: whether an address without a scheme is encrypted.

        Raises:
            ValueError: it is none of these.
        """
        url = url.strip()
        if not url:
            raise ValueError("the address of the server is empty: give host and port, such as localhost:8001")
        found = _SCHEME.match(url)
        scheme = found[1].lower() if found else ""
        if found is None or scheme in _RESOLVERS:
            return cls("grpc", url, secure)
        if scheme not in ("grpc", "grpcs", "http", "https"):
            raise ValueError(f"the scheme of {url!r} is none of grpc, grpcs, http and https")
        rest = url[found.end() :]
        host, slash, path = rest.partition("/")
        if "@" in host:
            raise ValueError("an address has no user and no password: give a key with api_key=")
        if not host or (slash and path and scheme.startswith("grpc")) or "?" in rest or "#" in rest:
            raise ValueError(f"{url!r} is no address of a server, which is {scheme}://host:port")
        if scheme.startswith("grpc"):
            return cls("grpc", host, scheme == "grpcs")
        return cls("http", f"{scheme}://{rest.rstrip('/')}", scheme == "https")

    def is_loopback(self) -> bool:
        """Whether it is on this machine itself."""
        return is_loopback(self.target if self.protocol == "grpc" else self.target.split("/")[2])


def is_loopback(target: str) -> bool:
    """Whether a gRPC target, with or without its scheme ("dns:", "ipv4:", "dns:///"), is on this machine itself."""
    target = target.rpartition("/")[2]
    scheme, _, rest = target.partition(":")
    target = rest if scheme in ("dns", "ipv4", "ipv6") else target
    host = target[1:].partition("]")[0] if target.startswith("[") else target.partition(":")[0]
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, repr=False)
class Settings:
    """What all connections of a client have in common; `Client` says what each is. Its keys are in no `repr`."""

    admin_key: str | None = None
    api_key: str | None = None
    headers: Headers | Callable[[], Headers] | None = None
    tls: TLS | bool = False
    max_message_bytes: int | None = None
    keepalive: float | None = KEEPALIVE

    def __post_init__(self) -> None:
        if self.max_message_bytes is not None and self.max_message_bytes < 1:
            raise ValueError(f"max_message_bytes must be at least 1, found {self.max_message_bytes}")
        if self.keepalive is not None and not self.keepalive >= 1:
            raise ValueError(f"keepalive must be at least 1 second, found {self.keepalive}")
        _checked("api_key", self.api_key or "")
        if isinstance(self.headers, Mapping):
            self.outgoing()

    def addresses(self, url: str | Sequence[str]) -> list[Address]:
        """The servers.

        Raises:
            ValueError: there is none, one is no address, or `tls` is not for it.
        """
        urls = [url] if isinstance(url, str) else list(url)
        if not urls:
            raise ValueError("there is no address of a server: give one, or several")
        found = [Address.parse(each, bool(self.tls)) for each in urls]
        for address, given in zip(found, urls, strict=True):
            if self.tls and not address.secure:
                raise ValueError(
                    f"{given!r} is not encrypted, but tls= is given: leave the scheme out, or take grpcs or https"
                )
        return found

    def certificates(self) -> TLS:
        """What `tls` says of certificates."""
        return self.tls if isinstance(self.tls, TLS) else TLS()

    def outgoing(self) -> list[tuple[str, str]]:
        """The headers of a request: the caller's, its key, and the trace that it belongs to.

        Raises:
            ValueError: a name or a value can't be sent.
        """
        given = self.headers() if callable(self.headers) else self.headers or {}
        found = {**_trace(), **{name.lower(): value for name, value in given.items()}}
        if self.api_key:
            found["authorization"] = f"Bearer {self.api_key}"
        for name, value in found.items():
            if not _NAME.fullmatch(name) or name.startswith("grpc-") or name.endswith("-bin"):
                raise ValueError(f"{name!r} can't be the name of a header: it is letters, digits and any of -_.")
            _checked(f"the header {name}", value)
        return list(found.items())

    def admin(self, url: str) -> str:
        """The admin key, "" if there is none; looked up at each call, because servers come and go.

        Raises:
            ForbiddenError: it can't be one.
        """
        key = (self.admin_key or _admin_key.find(url) or "").strip()
        if not key.isascii() or not key.isprintable():
            raise ForbiddenError("the admin key has impossible characters: a key is printable ASCII")
        return key


def _checked(what: str, value: object) -> None:
    """The value itself is in no message: it can be a secret."""
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or value != value.strip():
        raise ValueError(f"{what} must be a text of printable ASCII without spaces around it")


def _trace() -> dict[str, str]:
    """W3C's `traceparent` of the caller's span, where the program uses OpenTelemetry."""
    carrier: dict[str, str] = {}
    if "opentelemetry.trace" in sys.modules:  # a program without it does not pay for its import
        propagate: Any = __import__("opentelemetry.propagate", fromlist=["inject"])
        propagate.inject(carrier)
    return carrier


@contextlib.contextmanager
def http_installed() -> Iterator[None]:
    """Say what to install where the import in a `with` block fails: calls over HTTP need more than those over gRPC."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "httpx2":
            raise
        raise ModuleNotFoundError(
            "an address with http:// or https:// needs httpx2: pip install 'trident-serving[http]'", name="httpx2"
        ) from None
