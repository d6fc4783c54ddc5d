"""Which adapters are in the pool, who uses them, and which goes when another needs the room.

Rank 0 decides; the decisions leave as slot changes in the next step message, so that every rank's
pool takes the same steps in the same order.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...adapter_store import Pack, PackPin
from ..errors import PoolFull, WorkerError
from ..request import AdapterRef
from ..step import SlotChange
from .adapter_pool import AdapterPool
from .packs import HANDOVER_S, PackFetcher, close_later

log = logging.getLogger(__name__)


@dataclass
class _Resident:
    ref: AdapterRef
    slot: int
    nbytes: int
    users: int = 0
    last_used: int = 0
    doomed: bool = False  # purged while in use: freed with its last user


class Waiting(Exception):
    """The adapter can't be used yet. `for_room`: its pack is here, the pool has no room."""

    def __init__(self, for_room: bool):
        super().__init__()
        self.for_room = for_room


class Residency:
    """Adapters by key: in the pool, or on their way to this node's disk."""

    def __init__(self, pool: AdapterPool, fetcher: PackFetcher, base_fingerprint: str | None):
        self._pool, self._fetcher = pool, fetcher
        self._fingerprint = base_fingerprint
        self._residents: dict[str, _Resident] = {}
        self._by_slot: dict[int, _Resident] = {}
        self._fetched: dict[str, tuple[Path, str]] = {}
        self._free_slots = list(range(pool.max_slots - 1, -1, -1))
        self._desired: dict[str, AdapterRef] = {}
        self._refused: set[str] = set()  # prefetches that failed: not tried again until asked for
        self._no_room: set[str] = set()  # prefetches that wait until something is given up
        self._changes: list[SlotChange] = []
        self._pins: list[PackPin] = []  # of the packs that the changes name
        self._clock = 0
        self.loads: dict[str, int] = {}
        self.load_seconds = 0.0
        self.load_bytes = 0
        self.tier_seconds: dict[str, float] = {}  # of fetch and copy, by source
        self.tier_bytes: dict[str, int] = {}
        self.load_failures = 0
        self.evictions = 0

    def acquire(self, ref: AdapterRef) -> tuple[int, str]:
        """Takes hold of the adapter for one sequence.

        Returns:
            The slot, and the tier it came from: "gpu", "disk" or "s3".

        Raises:
            Waiting: not yet; call again later.
            AdapterTooLarge, or whatever the fetch raised: never.
        """
        self._clock += 1
        resident = self._residents.get(ref.key)
        tier = "gpu"
        if resident is None or resident.doomed:
            if resident is not None:
                raise Waiting(for_room=True)
            resident, tier = self._bring_in(ref, evict_desired=True)
        resident.users += 1
        resident.last_used = self._clock
        return resident.slot, tier

    def release(self, slot: int) -> None:
        """Ends one sequence's hold on `slot`."""
        resident = self._by_slot[slot]
        resident.users -= 1
        self._no_room.clear()
        if resident.doomed and resident.users == 0:
            self._drop(resident)

    def want(self, ref: AdapterRef) -> None:
        """Starts fetching the pack of a request that was just queued."""
        if ref.key not in self._residents and ref.key not in self._fetched:
            self._fetcher.start(ref)

    def set_desired(self, refs: Iterable[AdapterRef]) -> None:
        """The controller's advice: fetch and load these when there is room, keep them longest."""
        self._desired = {r.key: r for r in refs}
        self._refused &= self._desired.keys()

    def prefetch(self) -> None:
        """Moves at most one desired adapter into the pool; evicts only what nobody wants."""
        for key, ref in self._desired.items():
            if key in self._residents or key in self._refused:
                continue
            try:
                self._bring_in(ref, evict_desired=False)
                return
            except Waiting as wait:
                if wait.for_room:
                    self._no_room.add(key)
            except Exception:
                # A request for it will fetch again and report the reason to its tenant.
                self._refused.add(key)

    @property
    def prefetch_ready(self) -> bool:
        """Whether `prefetch` could do something now."""
        return any(
            k not in self._residents and k not in self._refused and not self._blocked(k)
            for k in self._desired
        )

    def purge(self, key: str) -> None:
        """Forgets an adapter; one in use goes with its last sequence."""
        self._desired.pop(key, None)
        self._fetched.pop(key, None)
        resident = self._residents.get(key)
        if resident is None:
            return
        if resident.users:
            resident.doomed = True
        else:
            self._drop(resident)

    def take_changes(self) -> list[SlotChange]:
        """Slot changes since the last call, in order, for the other ranks.

        They are to be sent at once: the packs that they name stay on the disk for HANDOVER_S.
        """
        changes, self._changes = self._changes, []
        if self._pins:
            close_later(self._pins, HANDOVER_S)
            self._pins = []
        return changes

    def resident(self) -> dict[str, int]:
        return {k: r.nbytes for k, r in self._residents.items()}

    def bytes_of(self, slot: int) -> int:
        """That the adapter in `slot` takes."""
        return self._by_slot[slot].nbytes

    @property
    def active_bytes(self) -> int:
        """Of adapters that sequences use now."""
        return sum(r.nbytes for r in self._residents.values() if r.users)

    @property
    def loading(self) -> list[str]:
        return self._fetcher.loading

    def _blocked(self, key: str) -> bool:
        return key in self._no_room or key in self._fetcher.loading

    def _bring_in(self, ref: AdapterRef, evict_desired: bool) -> tuple[_Resident, str]:
        if ref.key not in self._fetched:
            try:
                fetched = self._fetcher.poll(ref)
            except Exception:
                self.load_failures += 1
                raise
            if fetched is None:
                raise Waiting(for_room=False)
            self._fetched[ref.key] = fetched
        path, tier = self._fetched[ref.key]
        started = time.perf_counter()
        try:
            pin = PackPin(path)
        except FileNotFoundError:  # evicted since its fetch: it had to wait for room in the pool
            del self._fetched[ref.key]
            self._fetcher.start(ref)
            raise Waiting(for_room=False) from None
        try:
            pack = Pack.open(path, verify=False)  # its fetch verified it
            self._check(pack, ref)
            resident = self._load(pack, ref, path, evict_desired)
        except PoolFull:
            pin.close()
            raise Waiting(for_room=True) from None
        except Exception:
            pin.close()
            self.load_failures += 1
            del self._fetched[ref.key]
            raise
        self._pins.append(pin)
        del self._fetched[ref.key]
        self._count_load(ref.key, tier, time.perf_counter() - started, resident.nbytes)
        return resident, tier

    def _count_load(self, key: str, tier: str, seconds: float, nbytes: int) -> None:
        whole = seconds + self._fetcher.seconds.pop(key, 0.0)
        tenant, _, digest = key.partition("/")
        extra = {"tenant": tenant, "digest": digest, "seconds": round(whole, 4)}
        log.info("adapter loaded from %s, %d bytes", tier, nbytes, extra=extra)
        self.loads[tier] = self.loads.get(tier, 0) + 1
        self.load_seconds += seconds
        self.load_bytes += nbytes
        self.tier_seconds[tier] = self.tier_seconds.get(tier, 0.0) + whole
        self.tier_bytes[tier] = self.tier_bytes.get(tier, 0) + nbytes

    def _check(self, pack: Pack, ref: AdapterRef) -> None:
        if pack.digest != ref.digest:
            raise WorkerError(f"the pack of {ref.key} holds the digest {pack.digest}")
        if self._fingerprint and pack.base_fingerprint != self._fingerprint:
            raise WorkerError(
                f"adapter {ref.digest[:12]} was published for another base model "
                f"({pack.base_fingerprint[:12]}, this one is {self._fingerprint[:12]}); "
                "upload it again"
            )

    def _load(self, pack: Pack, ref: AdapterRef, path: Path, evict_desired: bool) -> _Resident:
        # Evicting for an adapter that can't fit anyway would empty the pool for nothing.
        self._pool.check_fits(pack)
        victims = self._victims(evict_desired)
        while True:
            if self._free_slots:
                slot = self._free_slots[-1]
                try:
                    nbytes = self._pool.load(slot, pack)
                    break
                except PoolFull:
                    pass
            if not victims:
                raise PoolFull(f"no room for {ref.key}")
            self._drop(victims.pop(0))
            self.evictions += 1
        self._free_slots.pop()
        self._changes.append(SlotChange(slot, str(path)))
        resident = _Resident(ref, slot, nbytes, last_used=self._clock)
        self._residents[ref.key] = self._by_slot[slot] = resident
        return resident

    def _victims(self, evict_desired: bool) -> list[_Resident]:
        """Idle residents, first to go first: undesired before desired, then least recent."""
        idle = [
            r
            for k, r in self._residents.items()
            if r.users == 0 and (evict_desired or k not in self._desired)
        ]
        return sorted(idle, key=lambda r: (r.ref.key in self._desired, r.last_used))

    def _drop(self, resident: _Resident) -> None:
        self._pool.unload(resident.slot)
        self._changes.append(SlotChange(resident.slot, None))
        self._free_slots.append(resident.slot)
        del self._by_slot[resident.slot]
        del self._residents[resident.ref.key]
        self._no_room.clear()
