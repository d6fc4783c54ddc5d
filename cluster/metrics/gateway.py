"""What a gateway replica measures."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from .instruments import BoundedSeries, counter, gauge, histogram
from .metric import TIERS
from .store import StoreRequests

AUTH_REASONS = ("missing", "unknown", "throttled", "forbidden", "store")
ROUTING_REASONS = ("base", "placed", "cold", "spill")


class GatewayMetrics:
    """Metrics of one gateway replica. All methods are cheap and never block.

    `tenant` and `adapter` are names; the base model's adapter is "base". Only the busiest
    `top_adapters` pairs, and as many tenants, have series of their own.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        top_adapters: int = 50,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        StoreRequests(registry)
        self._requests = counter("loraplex_gateway_requests_total", registry)
        self._in_flight = gauge("loraplex_gateway_in_flight_requests", registry)
        self._input = counter("loraplex_gateway_input_tokens_total", registry)
        self._output = counter("loraplex_gateway_output_tokens_total", registry)
        self._generations = counter("loraplex_gateway_generations_total", registry)
        self._limits = counter("loraplex_gateway_limits_hit_total", registry)
        self._auth = counter("loraplex_gateway_auth_failures_total", registry)
        self._uploads = counter("loraplex_gateway_uploads_total", registry)
        self._continuations = counter("loraplex_gateway_continuations_total", registry)
        self._decisions = counter("loraplex_gateway_routing_decisions_total", registry)
        self._first = histogram("loraplex_gateway_time_to_first_token_seconds", registry)
        self._first_of = histogram("loraplex_gateway_tenant_time_to_first_token_seconds", registry)
        self._between = histogram("loraplex_gateway_inter_token_seconds", registry)
        self._whole = histogram("loraplex_gateway_request_seconds", registry)
        # From the start, or the first event of a kind would be lost to `rate`.
        for reason in AUTH_REASONS:
            self._auth.labels(reason)
        for reason in ROUTING_REASONS:
            self._decisions.labels(reason)
        for tier in ("base", *TIERS):
            self._first.labels(tier)
        of_adapter = (self._input, self._output, self._generations)
        self._adapters = BoundedSeries(of_adapter, limit=top_adapters, clock=clock)
        self._tenants = BoundedSeries((self._first_of,), limit=top_adapters, clock=clock)
        self._limited = BoundedSeries((self._limits,), limit=top_adapters, clock=clock)
        self._ids: dict[str, str] = {}  # of tenants with series, by name

    def request(self, route: str, code: int, seconds: float) -> None:
        """An HTTP request was answered. `route` is the template ("/v1/adapters/{name}"), never
        the path itself, which anybody could make new series with."""
        self._requests.labels(route, str(code)).inc()
        self._whole.labels(route).observe(seconds)

    def generation_started(self) -> None:
        self._in_flight.inc()

    def generation_ended(self, tenant: str, tenant_id: str, adapter: str) -> None:
        self._in_flight.dec()
        self._ids[tenant] = tenant_id
        self._generations.labels(*self._adapters.labels(tenant, adapter, weight=1)).inc()

    def first_token(self, tenant: str, tier: str | None, seconds: float) -> None:
        """The first token of a request, `seconds` after its arrival."""
        self._first.labels(tier or "base").observe(seconds)
        self._first_of.labels(*self._tenants.labels(tenant, weight=1)).observe(seconds)

    def next_tokens(self, count: int, seconds: float) -> None:
        """`count` more tokens of a request, `seconds` after those before them."""
        for _ in range(count):
            self._between.observe(seconds / count)

    def tokens(self, tenant: str, adapter: str, prompt: int, output: int) -> None:
        """Counts tokens of a request; `prompt` once, `output` as they come or at the end."""
        labels = self._adapters.labels(tenant, adapter, weight=prompt + output)
        if prompt:
            self._input.labels(*labels).inc(prompt)
        if output:
            self._output.labels(*labels).inc(output)

    def limit_hit(self, tenant: str, limit: str) -> None:
        """A tenant's limit refused a request: "requests" or "tokens" (a minute), or a name of
        `TenantLimits` ("max_adapters", "max_bytes")."""
        self._limits.labels(*self._limited.labels(tenant, limit, weight=1)).inc()

    def auth_failure(self, reason: str) -> None:
        """One of AUTH_REASONS."""
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

    def shown(self) -> dict[tuple[str, str], set[str]]:
        """(tenant's name, its id) -> adapters, base included, that have series of their own."""
        found: dict[str, set[str]] = {}
        for tenant, adapter in self._adapters.kept():
            found.setdefault(tenant, set()).add(adapter)
        for tenant, *_ in self._tenants.kept() | self._limited.kept():
            found.setdefault(tenant, set())
        self._ids = {name: id_ for name, id_ in self._ids.items() if name in found}
        return {(name, self._ids[name]): found[name] for name in found if name in self._ids}

    def adapter_removed(self, tenant: str, adapter: str) -> None:
        """A deleted adapter's series go."""
        self._adapters.leave(tenant, adapter)

    def tenant_removed(self, tenant: str) -> None:
        """A deleted tenant's series go, and those of its adapters."""
        for series in (self._adapters, self._tenants, self._limited):
            for key in series.kept():
                if key[0] == tenant:
                    series.leave(*key)
