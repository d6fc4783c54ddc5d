"""The planner's working state: which groups should hold a copy of which adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

from ...workers import GroupReport
from ..rendezvous import rank


class Board:
    """Copies of adapters on serving groups, with the bytes and the demand that they add up to.

    A copy is *held* when the group reports it in its pool, else it is on its way. The n copies of
    an adapter share its demand evenly. A further copy is worth demand / (n + 1) (d'Hondt), so the
    total worth of a board only grows as worthless copies give way.
    """

    def __init__(
        self,
        groups: Iterable[GroupReport],
        demand: Mapping[str, float],
        sizes: Mapping[str, int],
        barred: AbstractSet[tuple[str, str]] = frozenset(),
        spare: float = 0.0,
    ) -> None:
        """`barred`: (adapter key, group) pairs that get no new copy. `spare`: share of every pool
        that is left free."""
        reports = {g.group: g.engine for g in groups}
        self.names = sorted(reports)
        self.demand = demand
        self.copies: dict[str, set[str]] = {}
        self.keys: dict[str, set[str]] = {name: set() for name in self.names}
        self.load = dict.fromkeys(self.names, 0.0)
        self._held = {name: reports[name].gpu for name in self.names}
        self._capacity = {n: int((1 - spare) * reports[n].pool_bytes_total) for n in self.names}
        self._used = dict.fromkeys(self.names, 0)
        self._sizes = sizes
        self._barred = barred
        self._holders: dict[str, set[str]] = {}
        for name in self.names:
            for key in self._held[name]:
                self._holders.setdefault(key, set()).add(name)
        self._near: dict[str, set[str]] = {}
        for name in self.names:
            for key in reports[name].host or reports[name].disk:
                self._near.setdefault(key, set()).add(name)
        self._orders: dict[str, list[str]] = {}
        self._ranked: dict[str, list[str]] = {}
        self._most_free: int | None = None

    def order(self, key: str) -> list[str]:
        """All groups as they rank by the adapter's hash, those that have its pack before others."""
        if key not in self._orders:
            near = self._near.get(key, ())
            ranked = rank(key, self.names)
            self._orders[key] = sorted(ranked, key=lambda g: g not in near) if near else ranked
        return self._orders[key]

    def size(self, key: str, group: str) -> int:
        """Bytes that the adapter takes, or would take, in the group's pool."""
        return self._held[group].get(key, self._sizes.get(key, 0))

    def holds(self, group: str, key: str) -> bool:
        return key in self._held[group]

    def holders(self, key: str) -> set[str]:
        """Groups that have the adapter in their pools, wanted there or not."""
        return set(self._holders.get(key, ()))

    def held_copies(self, key: str) -> list[str]:
        """The adapter's copies that are in pools now."""
        return [g for g in self.copies.get(key, ()) if self.holds(g, key)]

    def free(self, group: str) -> int:
        return self._capacity[group] - self._used[group]

    def fits(self, key: str, group: str) -> bool:
        return self.size(key, group) <= self.free(group)

    def able(self, key: str, group: str) -> bool:
        """The group's pool, emptied, would take the adapter."""
        return self.size(key, group) <= self._capacity[group]

    def open_to(self, key: str, group: str) -> bool:
        """A new copy may go to the group, now or after others made room."""
        return (
            group not in self.copies.get(key, ())
            and (key, group) not in self._barred
            and self.able(key, group)
        )

    def count(self, key: str) -> int:
        return len(self.copies.get(key, ()))

    def worth(self, key: str) -> float:
        """What the adapter's last copy is worth: its share of the demand."""
        return self.demand.get(key, 0.0) / max(1, self.count(key))

    def add(self, key: str, group: str) -> None:
        self._share(key, -1)
        self.copies.setdefault(key, set()).add(group)
        self.keys[group].add(key)
        self._used[group] += self.size(key, group)
        self._share(key, 1)

    def remove(self, key: str, group: str) -> None:
        self._share(key, -1)
        self.copies[key].discard(group)
        self.keys[group].discard(key)
        self._used[group] -= self.size(key, group)
        self._share(key, 1)

    def roomy(self, key: str) -> str | None:
        """Where a new copy goes without displacing any: the first group in hash order that has
        room and isn't loaded beyond 1.25 times the mean, else the least loaded one with room."""
        if self._most_free is None:
            self._most_free = max(map(self.free, self.names), default=0)
        if self._sizes.get(key, 0) > self._most_free:
            return None
        fitting = [g for g in self.order(key) if self.fits(key, g) and self.open_to(key, g)]
        if not fitting:
            return None
        share = self.demand.get(key, 0.0) / (self.count(key) + 1)
        bound = 1.25 * (sum(self.load.values()) + share) / len(self.names)
        within = (g for g in fitting if self.load[g] + share <= bound)
        return next(within, None) or min(fitting, key=lambda g: self.load[g])

    def ranked(self, group: str) -> Sequence[str]:
        """The group's adapters, the most worth first."""
        if group not in self._ranked:
            self._ranked[group] = sorted(self.keys[group], key=lambda k: (-self.worth(k), k))
        return self._ranked[group]

    def _share(self, key: str, sign: int) -> None:
        worth = self.worth(key)
        for group in self.copies.get(key, ()):
            self.load[group] += sign * worth
            self._ranked.pop(group, None)
        self._most_free = None
