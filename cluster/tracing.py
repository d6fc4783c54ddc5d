"""OpenTelemetry traces of requests: gateway -> group: queue -> load -> prefill -> decode.

Off unless LORAPLEX_TRACE_ENDPOINT is set; OpenTelemetry is imported only then. Which requests are
sampled is said by its own variable OTEL_TRACES_SAMPLER, or by the caller's `traceparent`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..workers import RequestTrace
from .errors import SettingsError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span


class Tracer:
    """Makes spans and hands them to an exporter, in a thread of its own.

    Args:
        service: `service.name` of this process.
        exporter: where spans go.
        at_once: export each span as it ends (tests).
    """

    def __init__(self, service: str, exporter: SpanExporter, at_once: bool = False) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(
            SimpleSpanProcessor(exporter) if at_once else BatchSpanProcessor(exporter)
        )
        self._tracer = self._provider.get_tracer("loraplex")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, traceparent: str | None) -> RequestSpan:
        """A request has come to a gateway, from a caller that may trace it already."""
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(name, self._context(traceparent), kind=SpanKind.SERVER)
        carrier: dict[str, str] = {}
        if span.get_span_context().trace_flags.sampled:
            from opentelemetry.trace import set_span_in_context

            self._propagator.inject(carrier, set_span_in_context(span))
        return RequestSpan(span, carrier.get("traceparent"))

    def group_request(self, trace: RequestTrace) -> None:
        """What a group did for a request, from its own record: one span with its parts below."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        span = self._tracer.start_span(
            "group",
            self._context(trace.traceparent),
            kind=SpanKind.SERVER,
            attributes=dict(trace.attributes),
            start_time=trace.started_ns,
        )
        if trace.error_code is not None:
            span.set_status(Status(StatusCode.ERROR, trace.error_code))
        inside = set_span_in_context(span)
        at = trace.started_ns
        for name, seconds in trace.spans.items():
            end = at + int(seconds * 1e9)
            self._tracer.start_span(name, inside, start_time=at).end(end)
            at = end
        span.end(max(at, time.time_ns()))

    def close(self) -> None:
        """Exports what is left."""
        self._provider.shutdown()

    def _context(self, traceparent: str | None) -> Context:
        return self._propagator.extract({"traceparent": traceparent} if traceparent else {})


class RequestSpan:
    """A gateway's span of one request. `traceparent` is for those who work on it further; None
    where it isn't sampled."""

    def __init__(self, span: Span, traceparent: str | None) -> None:
        self._span = span
        self.traceparent = traceparent

    def end(self, name: str, status: int, attributes: Mapping[str, str]) -> None:
        """The request was answered."""
        from opentelemetry.trace import Status, StatusCode

        self._span.update_name(name)
        self._span.set_attribute("http.response.status_code", status)
        self._span.set_attributes(dict(attributes))
        if status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


def make_tracer(endpoint: str | None, service: str) -> Tracer | None:
    """A tracer that sends to an OTLP collector over HTTP; None without an endpoint.

    Raises:
        SettingsError: OpenTelemetry isn't installed.
    """
    if endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise SettingsError(
            "trace_endpoint is set, but OpenTelemetry isn't installed: pip install "
            "'loraplex[tracing]'"
        ) from None
    return Tracer(service, OTLPSpanExporter(endpoint=endpoint))
