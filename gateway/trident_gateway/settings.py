"""What a gateway is told at its start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Settings:
    """The settings of one gateway.

    Attributes:
        triton: host and port of the gRPC endpoint of each server; `dns:` before them: of all that the name has.
        host: the address on which it listens.
        port: of it.
        workers: processes.
        keys: the file of API keys; None: everybody may ask.
        public: whether it may listen beyond this machine without keys.
        aliases: other names of models, and what they mean.
        cors_origins: origins whose pages may read answers, such as "https://example.com".
        max_body_bytes: of a request.
        max_audio_bytes: of a request with a recording.
        body_seconds: that a request may take to arrive.
        write_seconds: that a client may take to read what was sent.
        timeout: seconds that an answer may take, waiting included.
        grace: seconds for running answers once the gateway is told to end.
        max_running: requests of one model at once on one server; 0: as many as the model's slots and half its queue.
        max_waiting: requests of one model that wait for that; more are refused.
        queue_seconds: that one may wait.
        max_per_key: requests at once, running or waiting, with one key; 0: no limit. A key's own limit comes first.
        health_seconds: between two looks at each server.
        access_log: whether each request is logged.
    """

    triton: tuple[str, ...] = ("127.0.0.1:8001",)
    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1
    keys: Path | None = None
    public: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 8 * MEBIBYTE
    max_audio_bytes: int = 25 * MEBIBYTE
    body_seconds: float = 30.0
    write_seconds: float = 30.0
    timeout: float = 300.0
    grace: float = 30.0
    max_running: int = 0
    max_waiting: int = 1024
    queue_seconds: float = 120.0
    max_per_key: int = 0
    health_seconds: float = 2.0
    access_log: bool = True

    def __post_init__(self) -> None:
        if not self.triton:
            raise ValueError("triton names no server: give host:port of a gRPC endpoint")
        if self.host not in LOOPBACK and self.keys is None and not self.public:
            raise ValueError(
                f"{self.host} can be reached from other machines, and there are no API keys: give --keys FILE (made by "
                "trident-gateway key add), or --public to let everybody in"
            )
        for address in self.triton:
            _, parted, port = address.removeprefix("dns:").rpartition(":")
            if not parted or not port.isdecimal():
                raise ValueError(f"triton names {address!r}: give host:port of a gRPC endpoint, or dns:name:port")
        for name, least in _LEAST.items():
            if not least <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be at least {least}, and finite, found {value}")
        for name in _ABOVE_ZERO:
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be above 0, and finite, found {value}")
        if self.port > 65535:
            raise ValueError(f"port must be at most 65535, found {self.port}")


_LEAST = {
    **dict.fromkeys(("workers", "max_body_bytes", "max_audio_bytes"), 1),
    **dict.fromkeys(("port", "grace", "max_running", "max_waiting", "queue_seconds", "max_per_key"), 0),
}
_ABOVE_ZERO = ("body_seconds", "write_seconds", "timeout", "health_seconds")
