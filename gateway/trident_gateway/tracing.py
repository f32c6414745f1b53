"""Traces: a request's `traceparent` goes on to Triton, and with OpenTelemetry the gateway's own span is between both.

OpenTelemetry is used where `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` is set and
opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http are installed. The client then adds the span's own
`traceparent` to what it sends.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from trident_gateway.exchange import Exchange

logger = logging.getLogger(__name__)
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_passed_on: ContextVar[str | None] = ContextVar("traceparent", default=None)


def headers() -> dict[str, str]:
    """What a call of a server carries of the request that it is made for."""
    found = _passed_on.get()
    return {} if found is None else {"traceparent": found}


class Tracing:
    """The spans of one process.

    Args:
        tracer: OpenTelemetry's; None: there are no spans.
    """

    def __init__(self, tracer: Any = None) -> None:
        self._tracer = tracer

    @classmethod
    def configured(cls) -> Tracing:
        """As the environment says."""
        if not any(os.environ.get(name) for name in _ENDPOINTS):
            return cls()
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as missing:
            logger.warning("there are no traces: %s is not installed", missing.name)
            return cls()
        provider = TracerProvider(resource=Resource.create({"service.name": "trident-gateway"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(provider)
        return cls(trace.get_tracer("trident_gateway"))

    @contextlib.contextmanager
    def request(self, exchange: Exchange) -> Iterator[None]:
        """The time of one request."""
        if self._tracer is None:
            token = _passed_on.set(exchange.traceparent)
            try:
                yield
            finally:
                _passed_on.reset(token)
            return
        from opentelemetry import propagate, trace

        carrier = {} if exchange.traceparent is None else {"traceparent": exchange.traceparent}
        with self._tracer.start_as_current_span(
            exchange.method, context=propagate.extract(carrier), kind=trace.SpanKind.SERVER
        ) as span:
            try:
                yield
            finally:
                span.update_name(f"{exchange.method} {exchange.route or 'unknown'}")
                span.set_attribute("http.response.status_code", exchange.status)
                span.set_attribute("trident.request_id", exchange.request_id)
                if exchange.model:
                    span.set_attribute("gen_ai.request.model", exchange.model)
                if exchange.prompt_tokens is not None:
                    span.set_attribute("gen_ai.usage.input_tokens", exchange.prompt_tokens)
                if exchange.completion_tokens is not None:
                    span.set_attribute("gen_ai.usage.output_tokens", exchange.completion_tokens)
