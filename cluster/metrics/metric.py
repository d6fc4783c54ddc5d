"""What a declared metric is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Unit = Literal["", "requests", "tokens", "bytes", "seconds", "blocks", "adapters", "groups"]
# The dashboard that shows it.
Board = Literal["overview", "tenant", "adapter", "group", "controller", "store"]

# Where an adapter was when a request needed it, the nearest first.
TIERS = ("gpu", "host", "disk", "s3")
# What stands for everything beyond the busiest adapters or tenants, so that series stay bounded.
OTHER = "other"


@dataclass(frozen=True)
class Metric:
    """One declared metric.

    `name` is the family's name as Prometheus shows it (counters end in `_total`); a histogram
    exposes `_bucket`, `_sum` and `_count`.
    """

    name: str
    kind: Kind
    unit: Unit
    board: Board
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def samples(self) -> tuple[str, ...]:
        """Names that a query may use."""
        if self.kind == "histogram":
            return tuple(self.name + suffix for suffix in ("_bucket", "_sum", "_count"))
        return (self.name,)
