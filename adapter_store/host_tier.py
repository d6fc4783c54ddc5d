"""Packs in this node's memory, in front of its disk: one copy for all processes of the node."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterable
from functools import partial as bind
from pathlib import Path

from .disk_errors import disk_errors, logged_disk_errors
from .disk_tier import DiskTier, Location
from .errors import LocalDiskError, PackCorrupt, PackVersionError
from .eviction import Speed
from .host_arena import PREFIX, HostArena, Reservation
from .pack_download import PART_BYTES, read_at
from .pack_head import HeadCut, PackHead
from .part_queue import PartQueue
from .pins import PackPin
from .single_flight import Deliver, SingleFlight, Wanted, always

logger = logging.getLogger(__name__)

SHM = Path("/dev/shm")
_HEAD_BYTES = 256 << 10
_COPY_HELPERS = 7  # beside the thread that copies: fast disks want several reads at a time


class HostTier:
    """Verified packs in memory, over a disk tier: what costs least to bring back goes first.

    Thread-safe, and safe to be used on one folder by several processes. Where memory has no room
    for a pack, the disk's copy serves.

    Args:
        disk: what is asked for a pack that isn't here.
        max_bytes: of all packs here.
        folder: on a file system in memory; see `host_folder`.
        keep_bytes: of packs that `keep` keeps; None: half of `max_bytes`.
    """

    def __init__(
        self, disk: DiskTier, max_bytes: int, folder: Path, keep_bytes: int | None = None
    ) -> None:
        self._disk = disk
        self._copies = PartQueue(_COPY_HELPERS)
        self._flights: SingleFlight[Location] = SingleFlight()
        self._speed = Speed(latency_s=0.001, bytes_per_s=2e9)  # of the disk
        keep = max_bytes // 2 if keep_bytes is None else keep_bytes
        with disk_errors(f"use the host tier {folder}"):
            self._arena = HostArena(folder, max_bytes, self._restore_s, keep)

    def ensure(self, tenant_id: str, digest: str, wanted: Wanted = always) -> Location:
        """Brings a pack to memory.

        Args:
            wanted: as for `DiskTier.ensure`.

        Returns:
            What `Pack.open` opens in any process of this node, until the pack is evicted, which
            `PackPin` or an open Pack prevents; and the tier that it came from: "host", "disk" or
            "s3".

        Raises:
            As `DiskTier.ensure`.
        """
        key = f"{tenant_id}/{digest}"
        self._disk.check(key)
        path = self._arena.find(key)
        if path is not None:
            return path, "host"

        def fetch(wanted: Wanted, deliver: Deliver[Location]) -> None:
            with disk_errors("use the host tier"), self._arena.lock(key, wanted):
                self._bring(tenant_id, digest, wanted, deliver)

        return self._flights.run(key, wanted, fetch)

    def resident(self) -> dict[str, int]:
        """Bytes of every pack on the disk, by key."""
        return self._disk.resident()

    @property
    def host_bytes(self) -> int:
        """Of the memory for packs: what the first process on this folder asked for."""
        return self._arena.nbytes

    def host_resident(self) -> dict[str, int]:
        """Bytes of every pack in memory, by key."""
        return self._arena.resident()

    def remove(self, key: str) -> None:
        """Drops a pack from memory and disk unless it is in use or can't be removed now, for which
        `resident` and `host_resident` tell whether to try again."""
        self._disk.remove(key)
        with logged_disk_errors(f"remove the pack {key} from memory"):
            self._arena.remove(key)

    def keep(self, name: str, keep: bool = True) -> None:
        """As `DiskTier.keep`, for both tiers."""
        self._arena.kept.set(name, keep)
        self._disk.keep(name, keep)

    def keep_packs(self, keys: Iterable[str]) -> None:
        """As `DiskTier.keep_packs`, for both tiers."""
        keys = list(keys)
        self._arena.kept.set_packs(keys)
        self._disk.keep_packs(keys)

    def close(self) -> None:
        """Leaves the memory; the last process of the node that does so frees it."""
        self._arena.close()

    def _bring(
        self, tenant_id: str, digest: str, wanted: Wanted, deliver: Deliver[Location]
    ) -> None:
        key = f"{tenant_id}/{digest}"
        path = self._arena.find(key)  # another process may have brought it meanwhile
        if path is not None:
            deliver((path, "host"))
            return
        path = self._copy(key, self._disk.find(tenant_id, digest), digest, wanted)
        if path is not None:
            deliver((path, "disk"))
            return
        mirror = _Mirror(self, key, deliver)
        location, tier = self._disk.ensure(tenant_id, digest, wanted, mirror)
        if not mirror.done:
            # It was on the disk after all, or another call of this process fetched it.
            deliver((self._copy(key, location, digest, wanted) or location, tier))

    def _copy(self, key: str, path: Path | None, digest: str, wanted: Wanted) -> Path | None:
        """Copies a pack from the disk and checks it on the way; its entry.

        None: it isn't there, or is damaged and dropped, or memory has no room for it.
        """
        if path is None:
            return None
        place = None
        try:
            with PackPin(path) as pin:
                nbytes = os.fstat(pin.fd).st_size
                place = self.reserve(key, nbytes)
                if place is None:
                    return None
                started = time.monotonic()
                _copy_checked(pin.fd, place.view, path, digest, self._copies, wanted)
                self._speed.measured(nbytes, time.monotonic() - started)
                return place.publish()
        except FileNotFoundError:
            return None  # evicted meanwhile
        except (PackCorrupt, PackVersionError) as error:
            logger.warning("%s; it is fetched again", error)
            self._disk.drop(path)
            return None
        finally:
            if place is not None:
                place.release()

    def reserve(self, key: str, nbytes: int) -> Reservation | None:
        """A place for a pack in memory, None if it has none."""
        try:
            return self._arena.reserve(key, nbytes)
        except (LocalDiskError, OSError) as error:
            logger.warning("%s. The pack is used from the disk", error)
            return None

    def _restore_s(self, key: str, nbytes: int) -> float:
        speed = self._speed if self._disk.has(key) else self._disk.speed
        return speed.seconds(nbytes)


class _Mirror:
    """Where a download goes on its way to the disk: others get it before the disk has it.

    It belongs to the download, which may outlive the call that it was made for.
    """

    def __init__(self, tier: HostTier, key: str, deliver: Deliver[Location]) -> None:
        self._tier = tier
        self._key = key
        self._deliver = deliver
        self._place: Reservation | None = None
        self.done = False

    def reserve(self, nbytes: int) -> memoryview | None:
        self._place = self._tier.reserve(self._key, nbytes)
        return None if self._place is None else self._place.view

    def complete(self) -> None:
        assert self._place is not None
        path = self._place.publish()
        self.done = True
        self._deliver((path, "s3"))

    def release(self) -> None:
        if self._place is not None:
            self._place.release()


def host_folder(disk_folder: Path, parent: Path = SHM) -> Path:
    """Where the memory of the groups lies that share a disk folder."""
    name = hashlib.sha256(os.fsencode(Path(disk_folder).absolute())).hexdigest()[:16]
    return parent / f"{PREFIX}{os.getuid()}-{name}"


def _copy_checked(
    fd: int, view: memoryview, path: Path, digest: str, queue: PartQueue, wanted: Wanted
) -> None:
    """Reads all of a pack file into `view`. Raises PackCorrupt, PackVersionError."""
    have = 0
    need = min(_HEAD_BYTES, len(view))
    while True:
        read_at(fd, view[have:need], have)
        have = need
        try:
            head = PackHead.parse(view[:have], len(view), path)
            break
        except HeadCut as cut:
            need = cut.nbytes
    if head.digest != digest:
        raise PackCorrupt(f"{path} holds adapter {head.digest}, not {digest}")

    def copy(start: int, stop: int) -> None:
        if have < stop:
            low = max(start, have)
            read_at(fd, view[low:stop], low)
        head.check(view, start, stop)

    spans = head.spans(PART_BYTES)
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    queue.run([bind(copy, start, stop) for start, stop in spans], wanted)
