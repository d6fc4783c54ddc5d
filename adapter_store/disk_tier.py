"""Packs on this node's disk: a cache in front of the object store, shared by processes.

The folder is the only state. A pack is `<tenant>/<digest>.pack`, put there by a rename once it was
checked; its access time says when it was last wanted. A pin is a shared lock on the file, so that
other processes see it, and it ends with its holder. Who has mapped a pack needs none: the mapping
keeps the bytes of an evicted file. A pin is for who has told others of its path.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

from .blobs import Blobs
from .disk_errors import disk_errors
from .errors import AdapterCorrupt, LocalDiskError, PackCorrupt, PackVersionError
from .object_store import ObjectStore
from .pack import Pack
from .tenants import check_tenant_id

_SUFFIX = ".pack"
_PARTIAL = ".partial"
_LOCKS = ".locks"
# Pins are held for seconds: a fetch waits for them rather than fail.
_PINNED_S = 20.0
_POLL_S = 0.05

Location = tuple[Path, str]
Identity = tuple[int, int, int]  # inode, bytes, modification time: of a file that was checked


class PackPin:
    """Keeps a pack on the disk, against all processes, until it is closed. A context manager."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: as `DiskTier.ensure` gave it.

        Raises:
            FileNotFoundError: it isn't on the disk any more.
        """
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._fd, fcntl.LOCK_SH)
        if not _is_same(self._fd, path):  # evicted between open and lock
            self.close()
            raise FileNotFoundError(errno.ENOENT, "the pack was evicted", str(path))

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> PackPin:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class DiskTier:
    """Verified packs by (tenant, digest), the least recently wanted ones evicted by bytes.

    Thread-safe, and safe to be used on one folder by several processes; the bound is kept by
    whoever fetches. Keys are "tenant/digest".

    Args:
        max_bytes: of all packs in the folder.
    """

    def __init__(self, folder: Path, store: ObjectStore, max_bytes: int) -> None:
        self._folder = Path(folder)
        self._blobs = Blobs(store)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._flights: dict[str, Future[Location]] = {}
        self._verified: dict[str, Identity] = {}
        with disk_errors(f"use the disk cache {self._folder}"):
            (self._folder / _LOCKS).mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()

    def ensure(self, tenant_id: str, digest: str) -> Location:
        """Brings a pack to the disk.

        A pack is checked (checksums, digest) when it arrives and when this process first uses one
        that lies there; a damaged one is fetched again once. Calls for one pack at a time share
        one fetch, in this and in other processes.

        Returns:
            Its path, and the tier that it came from: "disk" or "s3".

        Raises:
            NotFound: the store doesn't have it (the adapter was deleted).
            AdapterCorrupt: the stored pack is damaged.
            LocalDiskError: no room for it beside what is pinned, or the folder can't be written.
            StoreUnavailable: it isn't on the disk and the store can't be reached.
        """
        key = _key(tenant_id, digest)
        with self._lock:
            flight = self._flights.get(key)
            mine = flight is None
            if flight is None:
                flight = self._flights[key] = Future()
        if mine:
            try:
                with disk_errors(f"use the disk cache {self._folder}"):
                    flight.set_result(self._ensure(tenant_id, digest))
            except BaseException as error:
                flight.set_exception(error)
            finally:
                with self._lock:
                    del self._flights[key]
        return flight.result()

    def resident(self) -> dict[str, int]:
        """Bytes of every pack on the disk, by key."""
        return {_key_of(path): stat.st_size for path, stat in self._packs()}

    def remove(self, key: str) -> None:
        """Drops a pack unless it is pinned, for which `resident` tells whether to try again.

        One that isn't there is no error.
        """
        _evict(self._path(key))

    def _ensure(self, tenant_id: str, digest: str) -> Location:
        key = _key(tenant_id, digest)
        path = self._path(key)
        with self._file_lock(key):  # one fetch on this node, whichever process asks
            if self._is_good(key, path, digest):
                with contextlib.suppress(FileNotFoundError):
                    _touch(path)
                return path, "disk"
            path.parent.mkdir(exist_ok=True)
            self._fetch(tenant_id, digest, path)
        with self._lock:
            self._verified[key] = _identity(path)
        return path, "s3"

    def _is_good(self, key: str, path: Path, digest: str) -> bool:
        try:
            identity = _identity(path)
        except FileNotFoundError:
            return False
        if self._verified.get(key) == identity:
            return True
        try:
            _verify(path, digest)
        except (PackCorrupt, PackVersionError):
            path.unlink(missing_ok=True)
            return False
        with self._lock:
            self._verified[key] = identity
        return True

    def _fetch(self, tenant_id: str, digest: str, path: Path) -> None:
        partial = path.with_name(f".{digest}{_PARTIAL}")
        for last in (False, True):
            try:
                self._blobs.download(tenant_id, digest, partial)
                _verify(partial, digest)
                self._make_room(partial.stat().st_size)
                _flush(partial)
                partial.rename(path)
                _flush(path.parent)
                return
            except (PackCorrupt, PackVersionError) as error:
                if last:
                    raise AdapterCorrupt(
                        f"the stored pack of adapter {digest} of tenant {tenant_id} is damaged "
                        f"({error}); publish the adapter again"
                    ) from error
            finally:
                _remove_partial(path)

    def _make_room(self, nbytes: int) -> None:
        if nbytes > self._max_bytes:
            raise LocalDiskError(
                f"an adapter of {nbytes} bytes doesn't fit into the {self._max_bytes} bytes of "
                f"the disk cache {self._folder}; make it larger"
            )
        deadline = time.monotonic() + _PINNED_S
        while not self._evict_for(nbytes):
            if time.monotonic() > deadline:
                raise LocalDiskError(
                    f"no room for {nbytes} bytes in the disk cache {self._folder}: all of its "
                    f"{self._max_bytes} bytes are in use; make it larger"
                )
            time.sleep(_POLL_S)

    def _evict_for(self, nbytes: int) -> bool:
        """Evicts the least recently wanted until `nbytes` more fit; False when pins forbid it."""
        packs = sorted(self._packs(), key=lambda item: item[1].st_atime_ns)
        total = nbytes + sum(stat.st_size for _, stat in packs)
        for path, stat in packs:
            if total <= self._max_bytes:
                break
            if _evict(path):
                total -= stat.st_size
        return total <= self._max_bytes

    def _packs(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._folder.glob(f"*/*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                yield path, path.stat()

    def _remove_abandoned(self) -> None:
        """Removes what fetches left whose processes died: a living one holds its pack's lock."""
        for partial in list(self._folder.glob(f"*/.*{_PARTIAL}*")):
            digest = partial.name[1:].partition(".")[0]
            key = _key(partial.parent.name, digest)
            with contextlib.suppress(BlockingIOError), self._file_lock(key, wait=False):
                _remove_partial(self._path(key))

    def _path(self, key: str) -> Path:
        tenant_id, _, digest = key.partition("/")
        check_tenant_id(tenant_id)
        if not digest.isalnum():
            raise ValueError(f"{digest!r} isn't an adapter digest")
        return self._folder / tenant_id / f"{digest}{_SUFFIX}"

    @contextlib.contextmanager
    def _file_lock(self, key: str, wait: bool = True) -> Iterator[None]:
        path = self._folder / _LOCKS / key.replace("/", "__")
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if _is_same(fd, path):
                    break
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # its last holder removed it: take the new one
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(fd)


def _key(tenant_id: str, digest: str) -> str:
    return f"{tenant_id}/{digest}"


def _key_of(path: Path) -> str:
    return _key(path.parent.name, path.name.removesuffix(_SUFFIX))


def _verify(path: Path, digest: str) -> None:
    """Raises PackCorrupt, PackVersionError."""
    found = Pack.open(path, verify=True).digest
    if found != digest:
        raise PackCorrupt(f"{path} holds adapter {found}, not {digest}")


def _identity(path: Path) -> Identity:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _touch(path: Path) -> None:
    """Sets the access time alone: mounts seldom do it by themselves."""
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _remove_partial(path: Path) -> None:
    """Removes what a fetch of this pack has written so far, also the transfer's own files."""
    for partial in list(path.parent.glob(f".{path.name.removesuffix(_SUFFIX)}{_PARTIAL}*")):
        partial.unlink(missing_ok=True)


def _evict(path: Path) -> bool:
    """Removes a pack unless it is pinned."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def _is_same(fd: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
