"""What became of adapters' loads, counted since the engine began."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LoadCounts:
    """
    Attributes:
        loads: by the tier that the adapter came from: "host", "disk" or "s3".
        seconds, bytes: of the copies into the pool.
        tier_seconds: of fetch and copy, by tier; tier_bytes likewise.
        evictions: adapters put out for others.
    """

    loads: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    bytes: int = 0
    tier_seconds: dict[str, float] = field(default_factory=dict)
    tier_bytes: dict[str, int] = field(default_factory=dict)
    failures: int = 0
    evictions: int = 0

    def loaded(self, tier: str, nbytes: int, fetch_s: float, load_s: float) -> None:
        """One more adapter is in the pool."""
        self.loads[tier] = self.loads.get(tier, 0) + 1
        self.seconds += load_s
        self.bytes += nbytes
        self.tier_seconds[tier] = self.tier_seconds.get(tier, 0.0) + fetch_s + load_s
        self.tier_bytes[tier] = self.tier_bytes.get(tier, 0) + nbytes
