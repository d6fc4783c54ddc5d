"""From declarations to prometheus-client objects, with a bounded number of adapter series."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client import disable_created_metrics as _disable_created_metrics

from .catalogue import METRICS
from .metric import OTHER, Kind

# `_created` samples would double the number of series, and no query of ours reads them.
_disable_created_metrics()


Key = tuple[str, ...]


def new_registry() -> CollectorRegistry:
    """A registry with this process's own CPU, memory and file figures."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def counter(name: str, registry: CollectorRegistry) -> Counter:
    """The declared counter `name`, registered. Raises KeyError when it isn't declared."""
    metric = METRICS[name]
    _check(name, metric.kind, "counter")
    return Counter(name, metric.help, metric.labels, registry=registry)


def gauge(name: str, registry: CollectorRegistry) -> Gauge:
    """The declared gauge `name`, registered. Raises KeyError when it isn't declared."""
    metric = METRICS[name]
    _check(name, metric.kind, "gauge")
    return Gauge(name, metric.help, metric.labels, registry=registry)


def histogram(name: str, registry: CollectorRegistry) -> Histogram:
    """The declared histogram `name`, registered. Raises KeyError when it isn't declared."""
    metric = METRICS[name]
    _check(name, metric.kind, "histogram")
    return Histogram(name, metric.help, metric.labels, registry=registry, buckets=metric.buckets)


def _check(name: str, declared: Kind, used: Kind) -> None:
    if declared != used:
        raise TypeError(f"metric {name} is declared as a {declared}, not as a {used}")


class TopKeys:
    """Decides which keys have series of their own: the busiest `limit`; the rest share one.

    Weights halve every `half_life_s`. A key takes over another's place only when it weighs twice
    as much, so that two of a kind don't swap for ever.
    """

    def __init__(
        self,
        limit: int,
        on_leave: Callable[[Key], None],
        half_life_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if limit < 1:
            raise ValueError(f"limit is {limit}; at least one key must have its own series")
        self._limit = limit
        self._on_leave = on_leave
        self._half_life_s = half_life_s
        self._clock = clock
        self._halved_at = clock()
        self._weights: dict[Key, float] = {}
        self._kept: set[Key] = set()

    def admit(self, key: Key, weight: float) -> bool:
        """Adds `weight` to a key; True when the key has a series of its own now."""
        self._decay()
        mine = self._weights[key] = self._weights.get(key, 0.0) + weight
        if key in self._kept:
            return True
        if len(self._kept) >= self._limit:
            lightest = min(self._kept, key=lambda k: (self._weights[k], k))
            if mine <= 2 * self._weights[lightest]:
                return False
            self._drop(lightest)
        self._kept.add(key)
        return True

    def leave(self, key: Key) -> None:
        """Forgets a key; its series goes."""
        self._weights.pop(key, None)
        self._drop(key)

    def kept(self) -> frozenset[Key]:
        """The keys that have series of their own."""
        return frozenset(self._kept)

    def _drop(self, key: Key) -> None:
        if key in self._kept:
            self._kept.discard(key)
            self._on_leave(key)

    def _decay(self) -> None:
        now = self._clock()
        halvings = int((now - self._halved_at) / self._half_life_s)
        if halvings <= 0:
            return
        self._halved_at += halvings * self._half_life_s
        faded = {k: w * 0.5**halvings for k, w in self._weights.items()}
        self._weights = {k: w for k, w in faded.items() if w >= 1.0}
        for key in self._kept - self._weights.keys():
            self._drop(key)


class BoundedSeries:
    """Label values of metrics with one series per key ((tenant, adapter), or (tenant,)), kept few.

    Metrics may have labels before these; their values are `prefix`.
    """

    def __init__(
        self,
        metrics: Iterable[Counter | Gauge | Histogram],
        prefix: Key = (),
        limit: int = 50,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = tuple(metrics)
        self._prefix = prefix
        self._top = TopKeys(limit, self._remove, clock=clock)

    def labels(self, *key: str, weight: float) -> Key:
        """Label values to count `weight` of a key's work under."""
        shown = key if self._top.admit(key, weight) else (OTHER,) * len(key)
        return (*self._prefix, *shown)

    def kept(self) -> frozenset[Key]:
        """Keys that have series of their own."""
        return self._top.kept()

    def leave(self, *key: str) -> None:
        """Removes a key's series: it was deleted, or this process no longer holds it."""
        self._top.leave(key)

    def _remove(self, key: Key) -> None:
        for metric in self._metrics:
            metric.remove(*self._prefix, *key)


def set_top_gauge(metric: Gauge, values: Mapping[Key, float], prefix: Key, limit: int) -> None:
    """Makes a gauge show exactly `values`: the `limit` largest, the rest added up as "other"."""
    ranked = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    shown = {(*prefix, *key): value for key, value in ranked[:limit]}
    if len(ranked) > limit:
        others = (OTHER,) * len(ranked[0][0])
        shown[(*prefix, *others)] = sum(value for _, value in ranked[limit:])
    set_gauge(metric, shown)


def set_gauge(metric: Gauge, values: Mapping[Key, float]) -> None:
    """Makes a labelled gauge show exactly `values`: label values -> value; other series go."""
    for family in metric.collect():
        for sample in family.samples:
            labels = tuple(sample.labels[name] for name in METRICS[sample.name].labels)
            if labels not in values:
                metric.remove(*labels)
    for labels, value in values.items():
        metric.labels(*labels).set(value)
