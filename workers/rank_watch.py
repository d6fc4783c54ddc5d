"""When the ranks of a group count as hung. Pure: the caller passes times and ends what hangs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

BEAT_EVERY_S = 0.5  # a rank sends a beat from a thread of its own
WATCH_EVERY_S = 0.25  # the front looks
# Of the front's own event loop, beyond WATCH_EVERY_S: what came meanwhile isn't read yet.
_LATE_S = 0.5


class RankTimes(Protocol):
    """Times in seconds of the front's clock."""

    @property
    def heard(self) -> float:
        """Of the last bytes: beats tell that the process runs."""
        ...

    @property
    def progressed(self) -> float:
        """Of the last report or outputs: these tell that the engine's loop turns, idle or not."""
        ...


class RankWatch:
    """Finds processes that don't run, and an engine that doesn't finish its step.

    A collective that some rank doesn't take part in is a step of rank 0 that doesn't end.

    Args:
        beat_timeout_s: a process that sends nothing for so long is stopped or starved.
        step_timeout_s: a step may take so long.
    """

    def __init__(self, beat_timeout_s: float, step_timeout_s: float):
        self._beat_timeout_s, self._step_timeout_s = beat_timeout_s, step_timeout_s
        self._looked: float | None = None
        self._awake_since = float("-inf")

    def look(self, now: float, ranks: Mapping[int, RankTimes]) -> str | None:
        """What is wrong, if anything. To be called every WATCH_EVERY_S."""
        if self._looked is None or now - self._looked > WATCH_EVERY_S + _LATE_S:
            self._awake_since = now  # this process itself was held up: nobody was listened to
        self._looked = now
        for rank, times in sorted(ranks.items()):
            silent_s = now - max(times.heard, self._awake_since)
            if silent_s > self._beat_timeout_s:
                return (
                    f"the process of rank {rank} has sent nothing for {silent_s:.1f} s: it is "
                    "stopped, or gets no CPU"
                )
        if 0 in ranks:
            stuck_s = now - max(ranks[0].progressed, self._awake_since)
            if stuck_s > self._step_timeout_s:
                return (
                    f"rank 0 has been in one step for {stuck_s:.1f} s: it hangs, or waits for "
                    "another rank that does. If steps may take so long, raise step_timeout_s "
                    f"({self._step_timeout_s:g} s)"
                )
        return None
