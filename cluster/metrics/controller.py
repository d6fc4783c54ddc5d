"""What the controller shows of itself."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry

from .engine import add_up
from .instruments import counter, gauge, histogram, set_gauge, set_top_gauge
from .store import StoreRequests


class ControllerMetrics:
    """Metrics of the controller; one `tick` call per tick, counts are cumulative."""

    def __init__(self, registry: CollectorRegistry, *, top_adapters: int = 50) -> None:
        StoreRequests(registry)
        self._top_adapters = top_adapters
        self._epoch = gauge("loraplex_controller_epoch", registry)
        self._groups = gauge("loraplex_controller_groups", registry)
        self._lost = counter("loraplex_controller_groups_lost_total", registry)
        self._desired = gauge("loraplex_controller_desired_adapters", registry)
        self._placed = gauge("loraplex_controller_placed_adapters", registry)
        self._replicas = gauge("loraplex_controller_replicas", registry)
        self._demand = gauge("loraplex_controller_demand_tokens_per_second", registry)
        self._moves = counter("loraplex_controller_moves_total", registry)
        self._moved_bytes = counter("loraplex_controller_moved_bytes_total", registry)
        self._seconds = histogram("loraplex_controller_tick_seconds", registry)
        self._purges = gauge("loraplex_controller_pending_purges", registry)
        self._counted: dict[str, float] = {}

    def tick(
        self,
        *,
        epoch: int,
        seconds: float,
        serving: int,
        draining: int,
        desired: Mapping[str, int],
        placed: int,
        replicas: int,
        demand: Mapping[str, float],
        pending_purges: int,
        totals: Mapping[str, float],
    ) -> None:
        """Shows one tick's outcome.

        Args:
            seconds: time that the tick took.
            desired: group -> number of adapters wanted there.
            replicas: copies wanted beyond each adapter's first.
            demand: adapter key -> tokens/s.
            totals: since the controller's start: "groups_lost", "moves_planned", "moves_done",
                "moves_dropped", "moved_bytes".
        """
        self._epoch.set(epoch)
        self._seconds.observe(seconds)
        self._groups.labels("serving").set(serving)
        self._groups.labels("draining").set(draining)
        set_gauge(self._desired, {(group,): count for group, count in desired.items()})
        self._placed.set(placed)
        self._replicas.set(replicas)
        self._purges.set(pending_purges)
        set_top_gauge(self._demand, add_up(demand), (), self._top_adapters)
        self._lost.inc(self._new(totals, "groups_lost"))
        self._moved_bytes.inc(self._new(totals, "moved_bytes"))
        for result in ("planned", "done", "dropped"):
            self._moves.labels(result).inc(self._new(totals, f"moves_{result}"))

    def _new(self, totals: Mapping[str, float], name: str) -> float:
        new = totals[name] - self._counted.get(name, 0.0)
        self._counted[name] = totals[name]
        return new
