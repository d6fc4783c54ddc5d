"""What the planner is told and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PlacementConfig:
    """How eagerly the planner acts.

    Args:
        min_rate: weighted tokens/s below which an adapter isn't planned for; it stays where it is
            until the room is needed.
        spare: share of the pools that is left to adapters nobody planned for, once what is asked
            for exceeds the pools: else every rare adapter's request would push out one that comes
            back at once. First copies are brought by requests then, not by the planner, which
            only chooses what stays.
        replica_min_rate: weighted tokens/s below which an adapter gets no second copy, and below
            which load isn't evened out between groups.
        replica_fill: how much of a group (running and waiting requests to those that it decodes
            together) one copy's adapter may fill before it gets another.
        replica_band: hysteresis of the number of copies, in copies.
        busy_ticks: over how many ticks the groups' load is averaged, for the number of copies.
        displace_margin: how many times the displaced copies' worth a new copy must be worth.
        imbalance: how many times the mean load a group must bear before an adapter leaves it.
        move_bytes_per_tick: bytes that groups are asked to load in a tick. What isn't used is
            saved up to one adapter's size, so that big ones can move too.
        host_copies: nodes whose memory should hold an adapter that is asked for.
        host_share: of a node's memory for packs, what those copies may take; the tier keeps as
            much from eviction (`HostTier`). The rest is for what requests bring.
        host_bytes_per_tick: bytes that nodes are asked to bring to memory in a tick, one adapter
            at least.
        patience_ticks: how long a copy may be on its way. Then it is given up for a tick, which
            lets another group have it, or makes the same one try again.
    """

    min_rate: float = 0.01
    spare: float = 0.2
    replica_min_rate: float = 20.0
    replica_fill: float = 0.6
    replica_band: float = 0.25
    busy_ticks: float = 10.0
    displace_margin: float = 1.5
    imbalance: float = 1.5
    move_bytes_per_tick: int = 1 << 30
    host_copies: int = 2
    host_share: float = 0.5
    host_bytes_per_tick: int = 1 << 30
    patience_ticks: int = 120


@dataclass(frozen=True)
class Move:
    """A copy that a group is asked to load."""

    key: str
    group: str
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """A plan, and what the next one needs to know of it.

    `desired`: group -> adapter keys, the most worth first. `host`: group -> keys whose packs its
    node should keep in memory. `placement`: adapter key -> groups to send its requests to, for the
    routing table. `near`: adapter key -> groups whose node has its pack. `moves`: loads newly asked
    for. `replicas`: copies meant for each adapter. `relocations`: adapter key -> (from, to); both
    are desired until `to` holds it. `waiting`: (adapter key, group) -> ticks that a copy has been
    on its way. `sizes`: bytes in a pool by adapter. `credit_bytes`: unused budget. `busy`: groups
    that the work at hand would fill, smoothed.
    """

    desired: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    host: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    placement: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    near: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    moves: tuple[Move, ...] = ()
    replicas: Mapping[str, int] = field(default_factory=dict)
    relocations: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    waiting: Mapping[tuple[str, str], int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    credit_bytes: int = 0
    busy: float = 0.0
