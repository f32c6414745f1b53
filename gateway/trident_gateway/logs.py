"""The access log: one line of JSON a request, without texts, keys, queries or unknown paths."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

from trident_gateway.exchange import Exchange

logger = logging.getLogger(__name__)


class AccessLog:
    """Writes to a stream; None: writes nothing."""

    def __init__(self, stream: TextIO | None = sys.stdout) -> None:
        self._stream = stream
        self._failed = False

    def write(self, exchange: Exchange, seconds: float) -> None:
        """One request that is over.

        Args:
            seconds: from its first byte to the last of the answer.
        """
        if self._stream is None:
            return
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": exchange.request_id,
            "method": exchange.method,
            "route": exchange.route,
            "status": exchange.status,
            "model": exchange.model,
            "key": exchange.key.name if exchange.key is not None else None,
            "client": exchange.client,
            "stream": exchange.stream,
            "prompt_tokens": exchange.prompt_tokens,
            "completion_tokens": exchange.completion_tokens,
            "queue_seconds": _rounded(exchange.queue_seconds),
            "first_byte_seconds": _rounded(exchange.first_byte_seconds),
            "seconds": _rounded(seconds),
            "trace_id": exchange.trace_id,
            "error": exchange.error,
        }
        line = {name: value for name, value in entry.items() if value is not None}
        try:
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()
            self._failed = False
        except OSError as error:  # nobody reads it, or the disk is full: that ends no request
            if not self._failed:
                logger.error("the access log can't be written: %s", error)
            self._failed = True


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
