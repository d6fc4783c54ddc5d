"""Deleted adapters, until every group has let go of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ...workers import EngineReport


@dataclass
class _Purge:
    asked_at_s: float
    told_at_s: dict[str, float] = field(default_factory=dict)  # by group
    done: set[str] = field(default_factory=set)


class Purges:
    """Hands deleted adapters' keys to every group until it reports them gone.

    A group that was told and then reports an adapter gone is done with it for good: should the
    same adapter be published again, that group may load it again. Time is passed in.
    """

    def __init__(
        self, linger_s: float = 30.0, give_up_s: float = 600.0, repeat_s: float = 5.0
    ) -> None:
        """
        Args:
            linger_s: how long a purge lasts at least, for groups that are just coming up.
            give_up_s: how long a group may report an adapter that it was told to drop.
            repeat_s: how long before a group that still reports it is told again. An adapter in
                use goes with its last request, so that one that was told is likely at it.
        """
        self._linger_s = linger_s
        self._give_up_s = give_up_s
        self._repeat_s = repeat_s
        self._purges: dict[str, _Purge] = {}

    def ask(self, keys: Iterable[str], now_s: float) -> None:
        """Adapters were deleted. Asking again starts again."""
        for key in keys:
            self._purges[key] = _Purge(now_s)

    def advise(self, group: str, report: EngineReport, now_s: float) -> list[str]:
        """Keys that the group must be told to drop now, in view of its newest report."""
        keys: list[str] = []
        for key, purge in self._purges.items():
            if group in purge.done:
                continue
            tiers = report.gpu, report.host, report.disk, report.loading
            holds = any(key in tier for tier in tiers)
            told_at_s = purge.told_at_s.get(group)
            if told_at_s is not None and not holds:
                purge.done.add(group)
            elif told_at_s is None or now_s - told_at_s >= self._repeat_s:
                purge.told_at_s[group] = now_s
                keys.append(key)
        return keys

    def tick(self, groups: Iterable[str], now_s: float) -> None:
        """Ends what is done by all `groups`, the live ones, or goes on for too long."""
        live = set(groups)
        for key, purge in list(self._purges.items()):
            age_s = now_s - purge.asked_at_s
            if age_s >= self._give_up_s or (age_s >= self._linger_s and live <= purge.done):
                del self._purges[key]

    def pending(self, groups: Iterable[str]) -> set[str]:
        """Keys that some of `groups`, the live ones, may still hold."""
        live = set(groups)
        return {key for key, purge in self._purges.items() if not live <= purge.done}
