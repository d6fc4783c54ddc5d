"""Which adapters are to be in the pool, and which goes when another needs the room.

Rank 0 decides; the decisions leave as slot changes in the next step message (`residents`).

An adapter's way: fetched to this node (`packs`), opened (`packs_opened`), its pages reserved, all
of them or none, and filled in the background (`loader`), then shown to the kernels. Every wait is
polled between steps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from ...adapter_store import Pack, PackPin
from ..errors import PoolFull, WorkerError
from ..request import AdapterRef
from ..step import SlotChange
from .adapter_pool import AdapterPool
from .early_start import Speeds
from .load_counts import LoadCounts
from .packs import HANDOVER_S, Fetched, PackFetcher, close_later
from .packs_opened import OpenedPack, PackOpener
from .residents import Resident, Residents

_RETRY_S = 30.0  # until a prefetch that failed is tried again, though nobody asked

log = logging.getLogger(__name__)


class Waiting(Exception):
    """The adapter can't be used yet. `for_room`: its pack is here, the pool has no room."""

    def __init__(self, for_room: bool):
        super().__init__()
        self.for_room = for_room


class Residency:
    """Adapters by key: in the pool, or on their way there."""

    def __init__(
        self,
        pool: AdapterPool,
        fetcher: PackFetcher,
        base_fingerprint: str | None,
        model_layers: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._pool, self._fetcher = pool, fetcher
        self._opener = PackOpener(self._examine)
        self._model_layers, self.speeds = model_layers, Speeds()
        self._fingerprint, self._time = base_fingerprint, clock
        self._residents = Residents(pool)
        self._wanted: dict[str, AdapterRef] = {}  # of queued requests; oldest first
        self._desired: dict[str, AdapterRef] = {}
        self._failed: dict[str, BaseException] = {}  # loads that a request waits for
        self._refused: dict[str, float] = {}  # prefetches that failed, and when to try again
        self._no_room: set[str] = set()  # prefetches that wait until something is given up
        self._pins: list[PackPin] = []  # of the packs that the changes name
        self._clock = 0
        self.counts = LoadCounts()

    def acquire(self, ref: AdapterRef, tokens: int = 0) -> tuple[int, str]:
        """Takes hold of the adapter for one sequence.

        Args:
            tokens: that the next step would compute: with many of them it may run while the last
                layers still come.

        Returns:
            The slot, and the tier it came from: "gpu", "host", "disk" or "s3".

        Raises:
            Waiting: not yet; call again later.
            AdapterTooLarge, or whatever fetch or load raised: never.
        """
        self._clock += 1
        resident = self._residents.by_key.get(ref.key)
        if resident is None:
            if (error := self._failed.pop(ref.key, None)) is not None:
                raise error
            try:
                self._bring_in(ref, evict=self._residents.idle(self._desired), fresh=True)
            except Waiting:
                raise
            except Exception:
                self._wanted.pop(ref.key, None)
                raise
            raise Waiting(for_room=False)
        if resident.doomed:
            raise Waiting(for_room=True)
        if not resident.shown:
            resident.fresh = True
            if not self._may_start(resident, tokens):
                raise Waiting(for_room=False)
            self._residents.show(resident)
        tier, resident.told = "gpu" if resident.told else resident.tier, True
        resident.users += 1
        resident.last_used = self._clock
        resident.fresh = False
        return resident.slot, tier

    def release(self, slot: int, drop: bool = False) -> None:
        """Ends one sequence's hold on `slot`.

        Args:
            drop: the adapter was purged while the sequence waited for it: it goes with the last
                that holds it.
        """
        resident = self._residents.by_slot[slot]
        resident.users -= 1
        resident.doomed |= drop and resident.users == 0
        self._no_room.clear()
        self._drop_doomed(resident)

    def size(self, slot: int) -> tuple[int, int]:
        """Bytes and largest rank of the adapter in `slot`."""
        resident = self._residents.by_slot[slot]
        return resident.nbytes, resident.rank

    def want(self, ref: AdapterRef) -> None:
        """Starts to bring the adapter of a request that was just queued, as far as there is
        room."""
        resident = self._residents.by_key.get(ref.key)
        if resident is None:
            self._failed.pop(ref.key, None)
            self._wanted[ref.key] = ref
            self._no_room.discard(ref.key)
            if not self._opener.has(ref.key):
                self._fetcher.start(ref)

    def give_up(self, key: str) -> None:
        """No request waits for the adapter any more; what the controller desires goes on."""
        self._wanted.pop(key, None)
        if key not in self._desired:
            self._fetcher.give_up(key)

    def set_desired(self, refs: Iterable[AdapterRef]) -> None:
        """The controller's advice: fetch and load these when there is room, keep them longest."""
        self._desired = {r.key: r for r in refs}
        self._refused = {k: at for k, at in self._refused.items() if k in self._desired}

    def settle(self) -> None:
        """Takes note of loads that have ended: their adapters are shown from the next step on."""
        for resident in self._residents.loading():
            load = resident.load
            assert load is not None
            if not load.done:
                continue
            resident.load = None
            self._no_room.clear()  # it may leave again
            if load.error is not None:
                self._fail(resident, load.error)
                continue
            if load.pinned:
                self.speeds.loaded(load.nbytes, load.seconds)
            self._count_load(resident, load.seconds)
            if not resident.shown and not resident.doomed:
                self._residents.show(resident)
            self._drop_doomed(resident)

    def prefetch(self) -> None:
        """Starts to load at most one adapter that a queued request waits for or that is desired;
        evicts only what nobody wants."""
        blocked = self._blocked()
        for key, ref in [*self._wanted.items(), *self._desired.items()]:
            if key in self._residents.by_key or self._fetcher.failed(ref):
                self._wanted.pop(key, None)  # who waits for it is told when it asks
            if key in self._residents.by_key or key in blocked:
                continue
            wanted = key in self._wanted
            idle = self._residents.idle(self._desired)
            spare = [r for r in idle if r.ref.key not in self._desired and not r.fresh]
            try:
                self._bring_in(ref, evict=spare, fresh=wanted)
                self._wanted.pop(key, None)
                return
            except Waiting as wait:
                if wait.for_room:
                    self._no_room.add(key)
            except Exception as error:
                if wanted:
                    self._failed[key] = error
                    del self._wanted[key]
                else:
                    # A request for it will fetch again and report the reason to its tenant.
                    self._refused[key] = self._time() + _RETRY_S

    @property
    def prefetch_ready(self) -> bool:
        """Whether `settle` or `prefetch` could do something now, or soon."""
        if self.loads_run:
            return True
        return bool(self._desired.keys() - self._residents.by_key.keys() - self._blocked())

    def rest(self, seconds: float) -> None:
        """Waits for something that comes in the background, for at most so long."""
        if coming := self._residents.loading():
            assert coming[0].load is not None
            coming[0].load.rest(seconds)
        elif self._opener.opening:
            self._opener.rest(seconds)
        elif self._fetcher.loading:
            self._fetcher.rest(seconds)

    def purge(self, key: str) -> None:
        """Forgets an adapter; one in use goes with its last sequence."""
        self._desired.pop(key, None)
        self._wanted.pop(key, None)
        self._failed.pop(key, None)
        self._opener.forget(key)
        resident = self._residents.by_key.get(key)
        if resident is not None:
            resident.doomed = True
            self._drop_doomed(resident)

    def take_changes(self) -> list[SlotChange]:
        """Slot changes since the last call, in order, for the other ranks.

        They are to be sent at once: the packs that they name stay on the disk for HANDOVER_S.
        """
        if self._pins:
            close_later(self._pins, HANDOVER_S)
            self._pins = []
        return self._residents.take_changes()

    def resident(self) -> dict[str, int]:
        return {k: r.nbytes for k, r in self._residents.by_key.items() if r.shown}

    @property
    def loads_run(self) -> bool:
        return bool(self._residents.loading())

    @property
    def active_bytes(self) -> int:
        """Of adapters that sequences use now."""
        return sum(r.nbytes for r in self._residents.by_key.values() if r.users)

    @property
    def loading(self) -> list[str]:
        coming = [k for k, r in self._residents.by_key.items() if not r.shown]
        return [*dict.fromkeys([*self._fetcher.loading, *self._opener.opening, *coming])]

    def close(self) -> None:
        self._opener.close()

    def _blocked(self) -> set[str]:
        """Whom `prefetch` can do nothing for now."""
        now = self._time()
        refused = (k for k, at in self._refused.items() if now < at)
        return {*self._no_room, *self._fetcher.loading, *self._opener.opening, *refused}

    def _bring_in(self, ref: AdapterRef, evict: list[Resident], fresh: bool) -> None:
        """Starts the adapter's load.

        Args:
            evict: who may go for it, first to go first.
            fresh: a request waits for it.

        Raises:
            Waiting: its pack isn't here and open yet, or there is no room.
            What is wrong with it.
        """
        try:
            opened = self._open(ref)
            if opened is None:
                raise Waiting(for_room=False)
            pin = PackPin(opened.path)
        except FileNotFoundError:  # evicted since its fetch: it had to wait for room in the pool
            self._opener.forget(ref.key)
            self._fetcher.start(ref)
            raise Waiting(for_room=False) from None
        except Waiting:
            raise
        except Exception:
            self.counts.failures += 1
            raise
        try:
            for resident in self._residents.in_the_way(opened, evict):
                # It gives way to a request: it comes back if the controller says so again.
                self._desired.pop(resident.ref.key, None)
                self._drop(resident)
                self.counts.evictions += 1
            self._residents.start_load(ref, opened, self._clock, fresh)
        except PoolFull:
            pin.close()
            raise Waiting(for_room=True) from None
        except BaseException:
            pin.close()
            raise
        self._pins.append(pin)
        self._opener.forget(ref.key)

    def _count_load(self, resident: Resident, load_s: float) -> None:
        tier, nbytes, whole = resident.tier, resident.nbytes, resident.fetch_s + load_s
        tenant, digest = resident.ref.tenant_id, resident.ref.digest
        extra = {"tenant": tenant, "digest": digest, "seconds": round(whole, 4)}
        log.info("adapter loaded from %s, %d bytes", tier, nbytes, extra=extra)
        self.counts.loaded(tier, nbytes, resident.fetch_s, load_s)

    def _open(self, ref: AdapterRef) -> OpenedPack | None:
        if not self._opener.has(ref.key):
            fetched = self._fetcher.poll(ref)
            if fetched is None:
                return None
            self._opener.start(ref.key, fetched)
        return self._opener.poll(ref.key)

    def _examine(self, key: str, fetched: Fetched) -> OpenedPack:
        """Called in the opener's threads."""
        path, tier, fetch_s = fetched
        pack = Pack.open(path, verify=False)  # its fetch verified it
        digest = key.rpartition("/")[2]
        if pack.digest != digest:
            raise WorkerError(f"the pack of {key} holds the digest {pack.digest}")
        if self._fingerprint and pack.base_fingerprint != self._fingerprint:
            raise WorkerError(
                f"adapter {digest[:12]} was published for another base model "
                f"({pack.base_fingerprint[:12]}, this one is {self._fingerprint[:12]}); "
                "upload it again"
            )
        return OpenedPack(path, tier, fetch_s, pack, self._pool.layouts(pack))

    def _may_start(self, resident: Resident, tokens: int) -> bool:
        """Whether a step may name it already and wait for each layer on the device.

        The first layer must have been launched: from there on, from memory that is pinned, nothing
        goes wrong that a device survives.
        """
        load = resident.load
        alone = [r.load for r in self._residents.loading()] == [load]
        if load is None or not (alone and load.pinned and load.underway):
            return False
        return self.speeds.may_start(load.layers, tokens, self._model_layers, load.elapsed)

    def _fail(self, resident: Resident, error: BaseException) -> None:
        """A load has failed: its pages are free again, and who waits for it is told."""
        key = resident.ref.key
        self.counts.failures += 1
        self._drop(resident)
        if resident.fresh:
            self._failed[key] = error
        else:
            self._refused[key] = self._time() + _RETRY_S

    def _drop_doomed(self, resident: Resident) -> None:
        if resident.doomed and resident.users == 0 and resident.load is None:
            self._drop(resident)

    def _drop(self, resident: Resident) -> None:
        self._residents.drop(resident)
        self._no_room.clear()
