"""A simulated node's tiers below the pool: host memory, disk and the object store."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Literal

from .clock import Clock
from .cores import Cores
from .hardware import Hardware

Tier = Literal["host", "disk", "s3"]


class ByteCache:
    """Packs by key up to a number of bytes; the least recently used goes, kept ones last."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.entries: OrderedDict[str, int] = OrderedDict()
        self.kept: AbstractSet[str] = frozenset()
        self._used = 0

    def touch(self, key: str) -> bool:
        """Whether the key is here; it counts as used now."""
        if key not in self.entries:
            return False
        self.entries.move_to_end(key)
        return True

    def put(self, key: str, nbytes: int) -> None:
        if nbytes > self.capacity or self.touch(key):
            return
        while self._used + nbytes > self.capacity:
            oldest = next((k for k in self.entries if k not in self.kept), None)
            self._used -= self.entries.pop(oldest or next(iter(self.entries)))
        self.entries[key] = nbytes
        self._used += nbytes


class NodeTiers:
    """Brings packs to host memory. Each medium moves one pack at a time, first come first served.

    Outlives the group's process, as the node's memory and disk do.
    """

    def __init__(
        self, name: str, clock: Clock, hardware: Hardware, sizes: Mapping[str, int], cores: Cores
    ) -> None:
        self.name, self._cores = name, cores
        self._clock, self._hardware, self._sizes = clock, hardware, sizes
        self.host = ByteCache(hardware.host_bytes)
        self.disk = ByteCache(hardware.disk_bytes)
        self.bytes_from: dict[str, int] = {"disk": 0, "s3": 0}
        self._free_at = {"disk": 0.0, "s3": 0.0}
        self._coming: dict[str, list[Callable[[], None]]] = {}

    def tier(self, key: str) -> Tier:
        if key in self.host.entries:
            return "host"
        return "disk" if key in self.disk.entries else "s3"

    def fetch(self, key: str, then: Callable[[], None]) -> Tier:
        """Calls `then` once the pack is in host memory; one transfer serves all who ask.

        Returns:
            The tier that it comes from.
        """
        if self.host.touch(key):
            self._clock.at(self._clock.now, then)
            return "host"
        tier: Tier = "disk" if key in self.disk.entries else "s3"
        if key in self._coming:
            self._coming[key].append(then)
            return tier
        self._coming[key] = [then]
        nbytes, hw = self._sizes[key], self._hardware
        speed, latency = (
            (hw.disk_bytes_s, 0.0) if tier == "disk" else (hw.s3_bytes_s, hw.s3_latency_s)
        )
        self._free_at[tier] = max(self._clock.now, self._free_at[tier]) + nbytes / speed
        self.bytes_from[tier] += nbytes
        latency *= self._cores.slowed
        self._clock.at(self._free_at[tier] + latency, lambda: self._arrived(key))
        return tier

    def hold(self, keys: Iterable[str]) -> None:
        """Brings these to host memory, and lets others go first."""
        wanted = list(keys)
        self.host.kept = frozenset(wanted)
        for key in wanted:
            if key not in self.host.entries and key not in self._coming:
                self.fetch(key, lambda: None)

    def _arrived(self, key: str) -> None:
        self.disk.put(key, self._sizes[key])
        self.host.put(key, self._sizes[key])
        for then in self._coming.pop(key):
            then()
