"""The routing table: what the controller publishes and every gateway routes by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class GroupEntry:
    """One worker group as the controller last saw it.

    `draining`: it takes nothing new. `standby`: it comes or goes, and takes requests only for
    adapters that are placed on it, or when there is no other group.
    """

    deployment: str
    group: str
    host: str
    port: int
    draining: bool = False
    queued: int = 0
    running: int = 0
    standby: bool = False


@dataclass(frozen=True)
class RoutingTable:
    """Groups that serve, and which of them should hold each adapter.

    `placement` maps `AdapterRef.key` to group names, preferred first; an adapter that isn't in
    it is cold. `near`: key -> groups whose node has its pack already, preferred first. `sizes`:
    key -> bytes in a pool, of adapters in either. (epoch, version)
    grows with every change; the epoch with every controller start.
    """

    epoch: int = 0
    version: int = 0
    groups: tuple[GroupEntry, ...] = ()
    placement: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    near: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def serving(self) -> dict[str, GroupEntry]:
        """Groups that take requests, by name."""
        return {e.group: e for e in self.groups if not e.draining}

    @cached_property
    def regular(self) -> list[str]:
        """Those that take any request: all but the standby ones, unless there are no others."""
        regular = [name for name, entry in self.serving.items() if not entry.standby]
        return regular or list(self.serving)

    def to_wire(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "version": self.version,
            "groups": [asdict(g) for g in self.groups],
            "placement": {k: list(v) for k, v in self.placement.items()},
            "near": {k: list(v) for k, v in self.near.items()},
            "sizes": dict(self.sizes),
        }

    @classmethod
    def from_wire(cls, msg: dict[str, Any]) -> RoutingTable:
        return cls(
            epoch=msg["epoch"],
            version=msg["version"],
            groups=tuple(GroupEntry(**g) for g in msg["groups"]),
            placement={k: tuple(v) for k, v in msg["placement"].items()},
            near={k: tuple(v) for k, v in msg.get("near", {}).items()},
            sizes=dict(msg.get("sizes", {})),
        )
