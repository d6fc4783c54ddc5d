"""Packs on this node's disk: a cache in front of the object store, shared by processes.

The folder is the only state. A pack is `<tenant>/<digest>.pack`, put there by a rename once it was
checked; its access time is its mark, which says how often and how lately it was wanted
(eviction.py). A pin is a shared lock on the file, so that other processes see it, and it ends with
its holder. Who has mapped a pack needs none: the mapping keeps the bytes of an evicted file. A pin
is for who has told others of its path.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .blobs import Blobs
from .disk_errors import disk_errors, logged_disk_errors
from .errors import (
    AdapterCorrupt,
    FetchCancelled,
    LocalDiskError,
    NotFound,
    PackCorrupt,
    PackVersionError,
    PreconditionFailed,
)
from .eviction import Held, Speed, protected, used, victims
from .kept import Kept
from .object_store import ObjectInfo, ObjectStore
from .pack import Pack
from .pack_download import Mirror, PackDownload, Partial
from .part_queue import PartQueue
from .pins import evict, file_lock, try_file_lock
from .single_flight import Deliver, SingleFlight, Wanted, always
from .tenants import check_tenant_id

_SUFFIX = ".pack"
_PARTIAL = ".partial"
_LOCKS = ".locks"
# Pins are held for seconds: a fetch waits for them rather than fail.
_PINNED_S = 20.0
_POLL_S = 0.05
# What a killed process has left of a pack is taken up again; after that long nobody will.
_PARTIAL_KEPT_S = 24 * 3600.0
_REPLACED = 3  # times that a stored pack may be replaced while it is fetched

Location = tuple[Path, str]
Identity = tuple[int, int, int]  # inode, bytes, modification time: of a file that was checked
Remake = Callable[[str, str], None]


class DiskTier:
    """Verified packs by (tenant, digest); what costs least to lose goes first.

    Thread-safe, and safe to be used on one folder by several processes; the bound is kept by
    whoever fetches. Keys are "tenant/digest".

    Args:
        max_bytes: of all packs in the folder, those on their way included.
        remake: called with (tenant, digest) of an adapter that the store has in another pack
            version only, to make its pack anew; None: that is an error.
        keep_bytes: of packs that `keep` keeps; None: half of `max_bytes`.
        parts: threads of downloads, when tiers share them.
    """

    def __init__(
        self,
        folder: Path,
        store: ObjectStore,
        max_bytes: int,
        *,
        remake: Remake | None = None,
        keep_bytes: int | None = None,
        parts: PartQueue | None = None,
    ) -> None:
        self._folder = Path(folder)
        self._store = store
        self._blobs = Blobs(store)
        self._max_bytes = max_bytes
        self._keep_bytes = max_bytes // 2 if keep_bytes is None else keep_bytes
        self._remake = remake
        self._parts = parts or PartQueue()
        self._flights: SingleFlight[Location] = SingleFlight()
        self._verified: dict[str, Identity] = {}
        self.speed = Speed(latency_s=0.03, bytes_per_s=500e6)  # of the store
        with disk_errors(f"use the disk cache {self._folder}"):
            (self._folder / _LOCKS).mkdir(parents=True, exist_ok=True)
            self._kept = Kept(self._folder)
            self._remove_abandoned()

    def ensure(
        self,
        tenant_id: str,
        digest: str,
        wanted: Wanted = always,
        mirror: Mirror | None = None,
    ) -> Location:
        """Brings a pack to the disk.

        A pack is checked (checksums, digest) when it arrives and when this process first uses one
        that lies there; a damaged one is fetched again once. Calls for one pack at a time share
        one fetch, in this and in other processes.

        Args:
            wanted: asked now and then; when it and those of all other calls for this pack say no,
                the fetch ends. What has come of it is there for the next one.
            mirror: memory that gets the pack, too, if this call is the one that fetches it.

        Returns:
            Its path, and the tier that it came from: "disk" or "s3".

        Raises:
            NotFound: the store doesn't have it (the adapter was deleted).
            AdapterCorrupt: the stored pack is damaged.
            PackVersionError: the stored pack is of another version and can't be remade here.
            LocalDiskError: no room for it beside what is pinned, or the folder can't be written.
            StoreUnavailable: it isn't on the disk and the store can't be reached.
            FetchCancelled: `wanted` said no.
        """
        path = self._path(_key(tenant_id, digest))

        def fetch(wanted: Wanted, deliver: Deliver[Location]) -> None:
            with disk_errors(f"use the disk cache {self._folder}"):
                deliver((path, self._ensure(tenant_id, digest, wanted, mirror)))

        return self._flights.run(_key(tenant_id, digest), wanted, fetch)

    def find(self, tenant_id: str, digest: str) -> Path | None:
        """Where a pack lies, unchecked: for who checks it while reading it. Counts as a use."""
        path = self._path(_key(tenant_id, digest))
        return path if _touch(path) else None

    def has(self, key: str) -> bool:
        return self._path(key).exists()

    def check(self, key: str) -> None:
        """Raises ValueError for what can't be a pack's key."""
        self._path(key)

    def drop(self, path: Path) -> None:
        """Removes a pack that was found damaged."""
        path.unlink(missing_ok=True)

    def resident(self) -> dict[str, int]:
        """Bytes of every pack on the disk, by key."""
        return {_key_of(path): stat.st_size for path, stat in self._packs()}

    @property
    def host_bytes(self) -> int:
        """None: `HostTier` has a node's memory."""
        return 0

    def host_resident(self) -> dict[str, int]:
        """None: `HostTier` has those in memory."""
        return {}

    def remove(self, key: str) -> None:
        """Drops a pack unless it is pinned or can't be removed now, for which `resident` tells
        whether to try again.

        One that isn't there is no error.
        """
        path = self._path(key)
        with logged_disk_errors(f"remove the pack {path}"):
            evict(path)
            with try_file_lock(self._lock_path(key)) as free:
                if free:
                    self._partial(path).remove()

    def keep(self, name: str, keep: bool = True) -> None:
        """Keeps a tenant's packs (`name`: its id) or one ("tenant/digest"), or does so no longer.

        It holds for all processes on the folder, and for what comes later. `keep_bytes` bounds it.
        """
        self._kept.set(name, keep)

    def keep_packs(self, keys: Iterable[str]) -> None:
        """Of single packs, keeps these ("tenant/digest") and no others."""
        self._kept.set_packs(keys)

    def _ensure(self, tenant_id: str, digest: str, wanted: Wanted, mirror: Mirror | None) -> str:
        key = _key(tenant_id, digest)
        path = self._path(key)
        with file_lock(self._lock_path(key), wanted):  # one fetch on this node, whoever asks
            if self._is_good(key, path, digest):
                _touch(path)
                return "disk"
            path.parent.mkdir(exist_ok=True)
            started = time.monotonic()
            # Of the file as it was checked: under its name it may be evicted at once.
            self._verified[key] = identity = self._fetch(tenant_id, digest, path, wanted, mirror)
            self.speed.measured(identity[1], time.monotonic() - started)
        return "s3"

    def _is_good(self, key: str, path: Path, digest: str) -> bool:
        try:
            identity = _identity(path)
            if self._verified.get(key) == identity:
                return True
            found = Pack.open(path, verify=True).digest
            if found != digest:
                raise PackCorrupt(f"{path} holds adapter {found}, not {digest}")
        except FileNotFoundError:
            return False
        except (PackCorrupt, PackVersionError):
            self.drop(path)
            return False
        self._verified[key] = identity
        return True

    def _fetch(
        self, tenant_id: str, digest: str, path: Path, wanted: Wanted, mirror: Mirror | None
    ) -> Identity:
        partial = self._partial(path)
        replaced = 0
        remade = False
        while True:
            try:
                source = self._blobs.find_pack(tenant_id, digest)
                self._make_room(source, partial, wanted)
                PackDownload(self._store, source, digest, partial).run(self._parts, wanted, mirror)
                identity = _identity(partial.path)
                partial.finish(path)
                _touch(path, new=True)
                return identity
            except PackVersionError:
                partial.remove()
                if remade or self._remake is None:
                    raise
                self._remake(tenant_id, digest)
                remade = True
            except PackCorrupt as error:
                partial.remove()
                raise AdapterCorrupt(
                    f"the stored pack of adapter {digest} of tenant {tenant_id} is damaged "
                    f"({error}); publish the adapter again"
                ) from error
            except (PreconditionFailed, NotFound):
                # Replaced or removed since it was listed; there may be another one.
                replaced += 1
                if replaced == _REPLACED or not self._blobs.exists(tenant_id, digest):
                    partial.remove()
                    raise

    def _make_room(self, source: ObjectInfo, partial: Partial, wanted: Wanted) -> None:
        """Also makes the partial file, which stands for its bytes from then on."""
        nbytes = source.nbytes
        if nbytes > self._max_bytes:
            raise LocalDiskError(
                f"an adapter of {nbytes} bytes doesn't fit into the {self._max_bytes} bytes of "
                f"the disk cache {self._folder}; make it larger"
            )
        deadline = time.monotonic() + _PINNED_S
        while True:
            with file_lock(self._folder / _LOCKS / ".room", wanted):
                if self._evict_for(nbytes, partial):
                    partial.open(source)
                    return
            if time.monotonic() > deadline:
                raise LocalDiskError(
                    f"no room for {nbytes} bytes in the disk cache {self._folder}: all of its "
                    f"{self._max_bytes} bytes are in use; make it larger"
                )
            if not wanted():
                raise FetchCancelled(f"nobody waits for {partial.path.name} any more")
            time.sleep(_POLL_S)

    def _evict_for(self, nbytes: int, mine: Partial) -> bool:
        """Evicts until `nbytes` more fit; False when what is in use forbids it.

        On a disk that others fill, too, the cache is as large as there is room.
        """
        packs = list(self._packs())
        partials = dict(self._partials())
        mine_bytes = partials.pop(mine.path, 0)
        held_bytes = sum(stat.st_size for _, stat in packs) + sum(partials.values())
        room = held_bytes + mine_bytes + shutil.disk_usage(self._folder).free
        most, total = min(self._max_bytes, room), nbytes + held_bytes
        if total > most:
            total -= self._remove_partials(mine)
        pinned: set[str] = set()
        while total > most:
            held = self._held(packs, pinned)
            chosen = victims(held, total - most)
            if chosen is None:
                return total <= self._max_bytes  # whoever makes the file says that the disk is full
            for item in chosen:
                if evict(self._path(item.key)):
                    total -= item.nbytes
                    packs = [p for p in packs if _key_of(p[0]) != item.key]
                else:
                    pinned.add(item.key)
        here = {_key_of(path) for path, _ in packs}
        for key in list(self._verified):
            if key not in here:
                self._verified.pop(key, None)
        return True

    def _held(self, packs: list[tuple[Path, os.stat_result]], pinned: set[str]) -> list[Held]:
        held = [
            Held(_key_of(p), s.st_size, s.st_atime, self.speed.seconds(s.st_size)) for p, s in packs
        ]
        fixed = pinned | protected(held, self._kept.names(), self._keep_bytes)
        return [Held(h.key, h.nbytes, h.mark, h.restore_s, h.key in fixed) for h in held]

    def _packs(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._folder.glob(f"*/*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                yield path, path.stat()

    def _partials(self) -> Iterator[tuple[Path, int]]:
        for path in self._folder.glob(f"*/.*{_PARTIAL}"):
            with contextlib.suppress(FileNotFoundError):
                yield path, path.stat().st_size

    def _remove_partials(self, mine: Partial | None = None, older_than_s: float = -math.inf) -> int:
        """Removes what stopped fetches have left, for which nobody works now; its bytes."""
        removed = 0
        for path, size in list(self._partials()):
            if mine is not None and path == mine.path:
                continue
            key = _key(path.parent.name, path.name[1:].removesuffix(_PARTIAL))
            with (
                contextlib.suppress(FileNotFoundError),
                try_file_lock(self._lock_path(key)) as free,
            ):
                if free and time.time() - path.stat().st_mtime >= older_than_s:
                    self._partial(self._path(key)).remove()
                    removed += size
        return removed

    def _remove_abandoned(self) -> None:
        self._remove_partials(older_than_s=_PARTIAL_KEPT_S)

    def _partial(self, path: Path) -> Partial:
        return Partial(path.with_name(f".{path.name.removesuffix(_SUFFIX)}{_PARTIAL}"))

    def _path(self, key: str) -> Path:
        tenant_id, _, digest = key.partition("/")
        check_tenant_id(tenant_id)
        if not digest.isalnum():
            raise ValueError(f"{digest!r} isn't an adapter digest")
        return self._folder / tenant_id / f"{digest}{_SUFFIX}"

    def _lock_path(self, key: str) -> Path:
        return self._folder / _LOCKS / key.replace("/", "__")


def _key(tenant_id: str, digest: str) -> str:
    return f"{tenant_id}/{digest}"


def _key_of(path: Path) -> str:
    return _key(path.parent.name, path.name.removesuffix(_SUFFIX))


def _identity(path: Path) -> Identity:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _touch(path: Path, new: bool = False) -> bool:
    """Counts a use in the access time, which mounts seldom set by themselves; False: it is gone."""
    try:
        stat = path.stat()
        mark = used(None if new else stat.st_atime, time.time())
        os.utime(path, ns=(int(mark * 1e9), stat.st_mtime_ns))
    except FileNotFoundError:
        return False
    return True
