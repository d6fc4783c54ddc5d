"""Which packs leave a tier when room is needed: those whose loss costs least.

What a pack's loss costs is how often it is wanted, times the seconds it takes to bring it back: the
rule of GreedyDual-Size-Frequency (Cherkasova, "Improving WWW Proxies Performance with
Greedy-Dual-Size-Frequency Caching Policy", HP Labs 1998). How often it is wanted is a count of its
uses that halves every HALF_LIFE_S, which joins recency and frequency (Lee et al., "LRFU", IEEE
Transactions on Computers 50 (12), 2001). Such a count and the time that it was taken at are one
number, the *mark*: the time at which the same count would have come of a single use. A file's
access time holds it, so it outlives processes and all processes of a node share it.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

# Loads come minutes apart: what isn't resident on a GPU only. Eight loads in a row count half an
# hour later as much as one does then.
HALF_LIFE_S = 600.0


@dataclass(frozen=True)
class Held:
    """A pack in a tier.

    Args:
        key: "tenant/digest".
        nbytes: that its loss would free.
        mark: of its uses, in seconds (see above).
        restore_s: how long it would take to bring it back.
        fixed: it must stay: in use, or kept for its tenant.
    """

    key: str
    nbytes: int
    mark: float
    restore_s: float
    fixed: bool = False


@dataclass(frozen=True)
class Placed:
    """A pack at its place in an arena."""

    held: Held
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.held.nbytes


def used(mark: float | None, now: float) -> float:
    """The mark after one more use at `now`, in seconds; None: it is the first."""
    if mark is None:
        return now
    # A clock that was set back mustn't make a pack immortal.
    count = 2.0 ** min((mark - now) / HALF_LIFE_S, 20.0)
    return now + HALF_LIFE_S * math.log2(1.0 + count)


def worth(held: Held) -> float:
    """What a byte of the pack is worth, as a logarithm: comparable between packs, no more."""
    return held.mark / HALF_LIFE_S + math.log2(max(held.restore_s, 1e-9) / max(held.nbytes, 1))


def victims(held: Iterable[Held], nbytes: int) -> list[Held] | None:
    """The packs to drop so that at least `nbytes` become free, the least worth first.

    No one of them could be spared. None: what isn't fixed doesn't suffice.
    """
    chosen: list[Held] = []
    freed = 0
    for item in sorted((h for h in held if not h.fixed), key=lambda h: (worth(h), h.key)):
        if freed >= nbytes:
            break
        chosen.append(item)
        freed += item.nbytes
    if freed < nbytes:
        return None
    for item in reversed(list(chosen)):  # the last ones may have made earlier ones needless
        if freed - item.nbytes >= nbytes:
            chosen.remove(item)
            freed -= item.nbytes
    return chosen


def place(
    packs: Collection[Placed], taken: Iterable[tuple[int, int]], size: int, nbytes: int
) -> tuple[int, list[Held]] | None:
    """Where in an arena a pack may go, and what has to leave for it.

    Of all places that begin where something ends, the one whose packs cost least to lose; of
    equals, the first.

    Args:
        packs: in the arena.
        taken: (start, stop) of other ranges that must stay.
        size: of the arena, in bytes.
        nbytes: of the new pack.

    Returns:
        The first byte, and the packs there. None: there is no such place.
    """
    movable = sorted((p for p in packs if not p.held.fixed), key=lambda p: p.start)
    fixed = sorted([*taken, *((p.start, p.stop) for p in packs if p.held.fixed)])
    newest = max((p.held.mark for p in movable), default=0.0)
    losses = [p.held.restore_s * 2.0 ** ((p.held.mark - newest) / HALF_LIFE_S) for p in movable]
    before = [0.0, *itertools.accumulate(losses)]
    begins = [p.start for p in movable]
    ends = [p.stop for p in movable]
    best: tuple[float, int, int, int] | None = None
    for start in sorted({0, *(stop for _, stop in fixed), *ends}):
        stop = start + nbytes
        if stop > size:
            break
        if _overlaps(fixed, start, stop):
            continue
        first, last = bisect.bisect_right(ends, start), bisect.bisect_left(begins, stop)
        loss = before[last] - before[first] if last > first else 0.0
        if best is None or loss < best[0]:
            best = loss, start, first, last
        if last <= first:
            break
    if best is None:
        return None
    _, start, first, last = best
    return start, [p.held for p in movable[first:last]]


def protected(held: Iterable[Held], names: Collection[str], max_bytes: int) -> set[str]:
    """Keys of the packs that are kept, the most worth first, for as long as they fit.

    Args:
        names: a tenant's id keeps all that it has, "tenant/digest" one pack.
        max_bytes: of all that is kept.
    """
    found: set[str] = set()
    wanted = [h for h in held if h.key in names or h.key.partition("/")[0] in names]
    for item in sorted(wanted, key=lambda h: (-worth(h), h.key)):
        if item.nbytes <= max_bytes:
            found.add(item.key)
            max_bytes -= item.nbytes
    return found


def _overlaps(ranges: Sequence[tuple[int, int]], start: int, stop: int) -> bool:
    """Whether one of the sorted `ranges` meets another; they may lie on each other."""
    return any(high > start for _, high in ranges[: bisect.bisect_left(ranges, (stop, 0))])


class Speed:
    """How fast packs come from somewhere, as measured so far.

    Args:
        latency_s: until the first byte.
        bytes_per_s: to begin with.
    """

    def __init__(self, latency_s: float, bytes_per_s: float) -> None:
        self._latency_s = latency_s
        self._bytes_per_s = bytes_per_s

    def seconds(self, nbytes: int) -> float:
        return self._latency_s + nbytes / self._bytes_per_s

    def measured(self, nbytes: int, seconds: float) -> None:
        """A pack came so fast. Small ones tell nothing: their time is latency."""
        if nbytes >= 1 << 20 and seconds > 0:
            self._bytes_per_s += 0.2 * (nbytes / seconds - self._bytes_per_s)
