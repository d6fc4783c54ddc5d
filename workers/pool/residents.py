"""The adapters that have pages in the pool: their slots, who uses them, and who goes first.

Each change of a slot is noted, so that every rank's pool takes the same steps in the same order.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from ..errors import PoolFull
from ..request import AdapterRef
from ..step import SlotChange
from .adapter_pool import AdapterPool
from .loader import Load
from .packs_opened import OpenedPack


@dataclass
class Resident:
    """An adapter in the pool, or on its way into pages that are its own already."""

    ref: AdapterRef
    slot: int
    nbytes: int
    rank: int  # the largest of its projections'
    tier: str  # that it came from
    fetch_s: float  # that it took from there to this node
    users: int = 0
    last_used: int = 0
    doomed: bool = False  # purged while in use or loading: freed when neither is
    load: Load | None = None  # while it hasn't ended
    shown: bool = True
    told: bool = False  # the first of who waited for it knows where it came from
    fresh: bool = False  # a request waited for it and hasn't taken hold yet


class Residents:
    """Slots and pages of a pool, by adapter."""

    def __init__(self, pool: AdapterPool):
        self._pool = pool
        self.by_key: dict[str, Resident] = {}
        self.by_slot: dict[int, Resident] = {}
        self._free_slots = list(range(pool.max_slots - 1, -1, -1))
        self._changes: list[SlotChange] = []

    def loading(self) -> list[Resident]:
        """Those whose load hasn't ended."""
        return [r for r in self.by_slot.values() if r.load is not None]

    def idle(self, desired: Container[str]) -> list[Resident]:
        """Residents that may go, first to go first: undesired before desired, then least recent;
        last of all those that a request has waited for and will take hold of."""
        idle = [r for r in self.by_key.values() if r.users == 0 and r.load is None]
        return sorted(idle, key=lambda r: (r.fresh, r.ref.key in desired, r.last_used))

    def in_the_way(self, opened: OpenedPack, evict: list[Resident]) -> list[Resident]:
        """Who of `evict` has to go for the pack: as few as it takes, from its head; none in vain.

        Raises:
            PoolFull: even without all of `evict` there would be no room.
        """
        gone = 0
        while not (self._free_slots or gone) or not self._pool.fits(
            opened.layouts, [r.slot for r in evict[:gone]]
        ):
            if gone == 0 and not self._pool.fits(opened.layouts, [r.slot for r in evict]):
                raise PoolFull(f"no room for {opened.pack.digest[:12]}")
            if gone == len(evict):
                raise PoolFull(f"no slot for {opened.pack.digest[:12]}")
            gone += 1
        return evict[:gone]

    def start_load(self, ref: AdapterRef, opened: OpenedPack, now: int, fresh: bool) -> Resident:
        """Gives the adapter a slot and pages, and begins to fill them.

        Args:
            now: its place in the order of use.
            fresh: a request waits for it.

        Raises:
            PoolFull: there is no room for it.
        """
        if not self._free_slots:
            raise PoolFull(f"no slot for {opened.pack.digest[:12]}")
        slot = self._free_slots[-1]
        load = self._pool.start_load(slot, opened.pack, opened.layouts)
        self._changes.append(SlotChange("load", slot, str(opened.path)))
        resident = Resident(
            ref,
            slot,
            opened.layouts.nbytes,
            opened.layouts.max_rank,
            opened.tier,
            opened.fetch_s,
            last_used=now,
            load=load,
            shown=False,
            told=not fresh,
            fresh=fresh,
        )
        self.hold(resident)
        return resident

    def hold(self, resident: Resident) -> None:
        """Takes note of an adapter whose slot and pages are given."""
        self._free_slots.remove(resident.slot)
        self.by_key[resident.ref.key] = self.by_slot[resident.slot] = resident

    def show(self, resident: Resident) -> None:
        """The next step's kernels may read it."""
        self._pool.show(resident.slot)
        self._changes.append(SlotChange("show", resident.slot))
        resident.shown = True

    def drop(self, resident: Resident) -> None:
        """Frees its slot and pages."""
        self._pool.unload(resident.slot)
        self._changes.append(SlotChange("unload", resident.slot))
        self._free_slots.append(resident.slot)
        del self.by_slot[resident.slot]
        del self.by_key[resident.ref.key]

    def take_changes(self) -> list[SlotChange]:
        """Slot changes since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes
