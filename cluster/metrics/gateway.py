"""What a gateway replica measures."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from .instruments import AdapterSeries, counter, gauge, histogram


class GatewayMetrics:
    """Metrics of one gateway replica. All methods are cheap and never block.

    `tenant` and `adapter` are names; the base model's adapter is "base". Only the busiest
    `top_adapters` pairs have series of their own.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        top_adapters: int = 50,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests = counter("loraplex_gateway_requests_total", registry)
        self._in_flight = gauge("loraplex_gateway_in_flight_requests", registry)
        self._input = counter("loraplex_gateway_input_tokens_total", registry)
        self._output = counter("loraplex_gateway_output_tokens_total", registry)
        self._limited = counter("loraplex_gateway_rate_limited_total", registry)
        self._auth = counter("loraplex_gateway_auth_failures_total", registry)
        self._uploads = counter("loraplex_gateway_uploads_total", registry)
        self._continuations = counter("loraplex_gateway_continuations_total", registry)
        self._decisions = counter("loraplex_gateway_routing_decisions_total", registry)
        self._first = histogram("loraplex_gateway_time_to_first_token_seconds", registry)
        self._between = histogram("loraplex_gateway_inter_token_seconds", registry)
        self._whole = histogram("loraplex_gateway_request_seconds", registry)
        self._adapters = AdapterSeries((self._input, self._output), limit=top_adapters, clock=clock)

    def request(self, route: str, code: int, seconds: float) -> None:
        """An HTTP request was answered. `route` is the template ("/v1/adapters/{name}"), never
        the path itself, which anybody could make new series with."""
        self._requests.labels(route, str(code)).inc()
        self._whole.labels(route).observe(seconds)

    def generation_started(self) -> None:
        self._in_flight.inc()

    def generation_ended(self) -> None:
        self._in_flight.dec()

    def first_token(self, tier: str | None, seconds: float) -> None:
        """The first token of a request, `seconds` after its arrival."""
        self._first.labels(tier or "base").observe(seconds)

    def next_tokens(self, count: int, seconds: float) -> None:
        """`count` more tokens of a request, `seconds` after those before them."""
        for _ in range(count):
            self._between.observe(seconds / count)

    def tokens(self, tenant: str, adapter: str, prompt: int, output: int) -> None:
        """Counts tokens of a request; `prompt` once, `output` as they come or at the end."""
        labels = self._adapters.labels(tenant, adapter, prompt + output)
        if prompt:
            self._input.labels(*labels).inc(prompt)
        if output:
            self._output.labels(*labels).inc(output)

    def rate_limited(self, limit: str) -> None:
        """A tenant's limit ("requests", "tokens", ...) refused a request."""
        self._limited.labels(limit).inc()

    def auth_failure(self, reason: str) -> None:
        """`reason`: "missing", "unknown", "revoked", "forbidden", "throttled"."""
        self._auth.labels(reason).inc()

    def upload(self, result: str) -> None:
        """An upload ended: "published", or the stable code of the refusal."""
        self._uploads.labels(result).inc()

    def continuation(self) -> None:
        """A request goes on at another group."""
        self._continuations.inc()

    def routed(self, reason: str) -> None:
        """`routing.Decision.reason` of a request."""
        self._decisions.labels(reason).inc()

    def adapter_removed(self, tenant: str, adapter: str) -> None:
        """A deleted adapter's series go."""
        self._adapters.leave(tenant, adapter)
