"""The routing table: what the controller publishes and every gateway routes by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class GroupEntry:
    """One worker group as the controller last saw it."""

    deployment: str
    group: str
    host: str
    port: int
    draining: bool = False
    queued: int = 0
    running: int = 0


@dataclass(frozen=True)
class RoutingTable:
    """Groups that serve, and which of them should hold each adapter.

    `placement` maps `AdapterRef.key` to group names, preferred first; an adapter that isn't in
    it is cold. (epoch, version) grows with every change; the epoch with every controller start.
    """

    epoch: int = 0
    version: int = 0
    groups: tuple[GroupEntry, ...] = ()
    placement: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "version": self.version,
            "groups": [asdict(g) for g in self.groups],
            "placement": {k: list(v) for k, v in self.placement.items()},
        }

    @classmethod
    def from_wire(cls, msg: dict[str, Any]) -> RoutingTable:
        return cls(
            epoch=msg["epoch"],
            version=msg["version"],
            groups=tuple(GroupEntry(**g) for g in msg["groups"]),
            placement={k: tuple(v) for k, v in msg["placement"].items()},
        )
