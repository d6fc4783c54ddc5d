"""Why requests wait, and for how long: seconds of queueing by cause.

Looked at from outside of the scheduler, every SAMPLE_S: what a waiting request lacks at such a
moment is taken for what it lacked since the last one. So the scheduler's rules may change without
this file, and the cost doesn't grow with the rate of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import get_args

from .request_times import Cause
from .sequence import Sequence

SAMPLE_S = 0.05


class QueueTime:
    """Adds up waiting time by cause. Time is passed in, by the clock of `RequestTimes`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(get_args(Cause), 0.0)
        self._sampled_s = 0.0

    def due(self, now: float) -> bool:
        """Whether the last look at the queue was long enough ago."""
        return now - self._sampled_s >= SAMPLE_S

    def sample(
        self, now: float, waiting: Iterable[Sequence], cause: Callable[[Sequence], Cause]
    ) -> None:
        """Looks at the queue."""
        self._sampled_s = now
        for seq in waiting:
            why = cause(seq)
            self._book(seq, now, why)
            seq.times.waits_for, seq.times.in_batch = why, False

    def admitted(self, now: float, seq: Sequence) -> None:
        """A sequence that isn't `in_batch` by its times has come into it."""
        times = seq.times
        unseen: Cause = "batch" if seq.tier in (None, "base", "gpu") else "adapter"
        self._book(seq, now, times.waits_for or unseen)
        times.admitted_s = times.admitted_s or now
        times.waits_for, times.in_batch = None, True

    def _book(self, seq: Sequence, now: float, cause: Cause) -> None:
        times = seq.times
        # A preempted one that is seen in the queue for the first time has run until lately.
        seconds = 0.0 if times.in_batch else now - times.counted_s
        times.counted_s = now
        self.seconds[cause] += seconds
        if cause in ("adapter", "pool") and not times.admitted_s:
            times.load_s += seconds


def cause_of(*, resident: bool, loading: bool, needed_blocks: int, free_blocks: int) -> Cause:
    """What a waiting request lacks.

    Args:
        resident: its adapter is in the pool, or it has none.
        loading: its adapter's pack is on the way to this node.
        needed_blocks: of the KV cache, for its first step, with what the running ones may take.
    """
    if not resident:
        return "adapter" if loading else "pool"
    return "kv" if needed_blocks > free_blocks else "batch"
