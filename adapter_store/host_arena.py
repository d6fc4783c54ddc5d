"""One file of memory for the packs of a node, mapped by all of its processes.

    <folder>/arena                     the packs' bytes
    <folder>/<tenant>/<digest>.pack    a pack that is there (host_entry.py)
    <folder>/<tenant>/.<any>.fill      a place that somebody fills, who holds its lock
    <folder>/users                     a lock that every process holds which uses the arena
    <folder>/.locks/                   locks of keys, and of the layout

These files are the only state. A pack appears by a link when all of its bytes are there; what
a killed process was filling has no lock any more, and its place is free again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import LocalDiskError
from .eviction import Held, Placed, place, protected, used
from .host_entry import ARENA, ENTRY_BYTES, entry, map_arena, parse_entry
from .kept import Kept
from .pack_layout import DATA_ALIGN, align
from .pins import file_lock, is_same, lock_unpinned, take

logger = logging.getLogger(__name__)

PREFIX = "loraplex-host-"
_SUFFIX = ".pack"
_FILL = ".fill"
_LOCKS = ".locks"
_GRAIN_BYTES = 2 << 20  # in which memory is asked for


class Reservation:
    """A place in the arena that nobody else writes to until `release`.

    Attributes:
        view: its bytes, writeable.
    """

    def __init__(
        self,
        fd: int,
        fill: Path,
        path: Path,
        view: memoryview,
        layout_lock: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._fd = fd
        self._fill = fill
        self._path = path
        self._layout_lock = layout_lock
        self.view = view

    def publish(self) -> Path:
        """Makes the pack visible: all of its bytes are there. Returns its entry.

        It is pinned until `release`. If somebody else has brought the same pack meanwhile, that one
        stays, as it may be in use.
        """
        now = int(time.time() * 1e9)
        os.utime(self._fd, ns=(now, now))
        with self._layout_lock(), contextlib.suppress(FileExistsError):
            os.link(self._fill, self._path)
            self._fill.unlink()
            # From the writer's lock to a pin; nobody evicts in between, who holds this lock.
            fcntl.flock(self._fd, fcntl.LOCK_SH)
        return self._path

    def release(self) -> None:
        """Ends the pin of what was published, gives back the place of what wasn't."""
        if self._fd >= 0:
            self.view = memoryview(b"")
            self._fill.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


class HostArena:
    """Thread-safe, and safe to be used by several processes. Keys are "tenant/digest".

    Args:
        folder: of the arena, on a file system in memory; its parent may hold arenas of other
            services, and of ended ones, which are removed.
        max_bytes: of the arena. One that other processes use keeps its size, see `nbytes`.
        restore_s: seconds to bring (key, bytes) back once it has left.
        keep_bytes: of packs that are kept for tenants.

    Raises:
        LocalDiskError: the folder can't be used.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        restore_s: Callable[[str, int], float],
        keep_bytes: int,
    ) -> None:
        self._folder = Path(folder)
        self._restore_s = restore_s
        self._keep_bytes = keep_bytes
        _remove_ended(self._folder)
        self._users, self._size = _join(self._folder, align(max_bytes, DATA_ALIGN))
        self.kept = Kept(self._folder)
        self._map = map_arena(self._folder / ARENA)
        self._places: dict[Path, tuple[int, int, int]] = {}  # inode, offset, bytes
        self._committed: set[int] = set()  # grains whose memory is there; it never leaves

    @property
    def nbytes(self) -> int:
        return self._size

    def find(self, key: str) -> Path | None:
        """A pack's entry; counts as a use."""
        path = self._path(key)
        try:
            mark = used(path.stat().st_atime, time.time())
            os.utime(path, ns=(int(mark * 1e9), path.stat().st_mtime_ns))
        except FileNotFoundError:
            return None
        return path

    @contextlib.contextmanager
    def lock(self, key: str, wanted: Callable[[], bool]) -> Iterator[None]:
        """One process brings a pack. Raises FetchCancelled: `wanted` said no."""
        with file_lock(self._folder / _LOCKS / key.replace("/", "__"), wanted):
            yield

    def reserve(self, key: str, nbytes: int) -> Reservation | None:
        """A place for a pack, for which others may leave; None: what is in use leaves none.

        Raises:
            LocalDiskError, OSError: the file system is full.
        """
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        fill = path.with_name(f".{secrets.token_hex(8)}{_FILL}")
        room = align(nbytes, DATA_ALIGN)
        with contextlib.ExitStack() as undo:
            with self._layout_lock():
                start = self._clear(room)
                if start is None:
                    return None
                fd = os.open(fill, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                view = self._map.data[start : start + nbytes]
                place = Reservation(fd, fill, path, view, self._layout_lock)
                undo.callback(place.release)
                take(fd)
                os.pwrite(fd, entry(start, nbytes), 0)
            self._commit(start, room)
            undo.pop_all()
        return place

    def resident(self) -> dict[str, int]:
        """Bytes of every pack, by key."""
        return {_key_of(path): nbytes for path, (_, nbytes) in self._entries()}

    def remove(self, key: str) -> None:
        """Drops a pack unless it is in use."""
        path = self._path(key)
        with self._layout_lock():
            fd = lock_unpinned(path)
            if fd is not None:
                path.unlink(missing_ok=True)
                os.close(fd)

    def close(self) -> None:
        """Leaves the arena; the last one who does removes it."""
        if self._users < 0:
            return
        fcntl.flock(self._users, fcntl.LOCK_UN)
        if take(self._users) and is_same(self._users, self._folder / "users"):
            shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._users)
        self._users = -1

    def _clear(self, nbytes: int) -> int | None:
        """Makes room and returns where; the layout lock is held."""
        pinned: set[str] = set()
        filling = self._filling()
        while True:
            packs = [
                Placed(self._held(path, align(size, DATA_ALIGN), pinned), start)
                for path, (start, size) in self._entries()
            ]
            names = self.kept.names()
            if names:
                kept = protected([p.held for p in packs], names, self._keep_bytes)
                packs = [
                    Placed(_fixed(p.held), p.start) if p.held.key in kept else p for p in packs
                ]
            found = place(packs, filling, self._size, nbytes)
            if found is None:
                return None
            start, leaving = found
            locks = {item.key: lock_unpinned(self._path(item.key)) for item in leaving}
            # All or none: what has left can't come back because another one stays.
            gone = {key for key, fd in locks.items() if fd is None}
            for key, fd in locks.items():
                if fd is not None:
                    if not gone:
                        self._path(key).unlink(missing_ok=True)
                    os.close(fd)
            if not gone:
                return start
            pinned |= gone

    def _held(self, path: Path, nbytes: int, pinned: set[str]) -> Held:
        key = _key_of(path)
        try:
            mark = path.stat().st_atime
        except FileNotFoundError:
            mark = 0.0
        return Held(key, nbytes, mark, self._restore_s(key, nbytes), key in pinned)

    def _entries(self) -> list[tuple[Path, tuple[int, int]]]:
        """(entry, (offset, bytes)) of every pack."""
        places: dict[Path, tuple[int, int, int]] = {}
        for path in self._folder.glob(f"*/[!.]*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                inode = path.stat().st_ino
                known = self._places.get(path)
                if known is None or known[0] != inode:
                    known = inode, *parse_entry(path.read_bytes())
                places[path] = known
        self._places = places
        return [(path, place[1:]) for path, place in places.items()]

    def _filling(self) -> list[tuple[int, int]]:
        """(start, stop) of what is being filled; forgets what killed processes left."""
        ranges = []
        for path in self._folder.glob(f"*/.*{_FILL}"):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                if take(fd):
                    if is_same(fd, path):
                        path.unlink()
                    continue
                data = os.pread(fd, ENTRY_BYTES, 0)
                offset, nbytes = parse_entry(data)
                ranges.append((offset, offset + align(nbytes, DATA_ALIGN)))
            finally:
                os.close(fd)
        return ranges

    def _commit(self, start: int, nbytes: int) -> None:
        """Gets the memory now: a write to a mapping for which there is none would kill us.

        Asking again for memory that is there takes 70 ms a gigabyte: what is known to be isn't.
        """
        grains = range(start // _GRAIN_BYTES, -(-(start + nbytes) // _GRAIN_BYTES))
        missing = [g for g in grains if g not in self._committed]
        if not missing:
            return
        low, high = missing[0] * _GRAIN_BYTES, (missing[-1] + 1) * _GRAIN_BYTES
        fd = os.open(self._folder / ARENA, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(fd, low, min(high, self._size) - low)
            self._committed.update(grains)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            free = shutil.disk_usage(self._folder).free
            raise LocalDiskError(
                f"no memory for a pack of {nbytes} bytes in {self._folder}: {free} bytes are free "
                f"there and the host tier may take {self._size}; make that file system larger "
                "(Docker: --shm-size), or set LORAPLEX_HOST_CACHE_BYTES to less"
            ) from error
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _layout_lock(self) -> Iterator[None]:
        with file_lock(self._folder / _LOCKS / ".layout"):
            yield

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"


def _fixed(held: Held) -> Held:
    return Held(held.key, held.nbytes, held.mark, held.restore_s, True)


def _key_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name.removesuffix(_SUFFIX)}"


def _join(folder: Path, size: int) -> tuple[int, int]:
    """Becomes a user of the arena, and makes it if need be.

    Returns:
        A descriptor whose shared lock says so, and the arena's size in bytes.
    """
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise LocalDiskError(f"{folder} belongs to another user; choose another folder")
        try:
            fd = os.open(folder / "users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # whoever left last is just removing the folder
        try:
            alone = take(fd)
            if not alone:
                fcntl.flock(fd, fcntl.LOCK_SH)
            if is_same(fd, folder / "users"):
                if alone:
                    _make(folder, size)
                fcntl.flock(fd, fcntl.LOCK_SH)
                # Between the two locks somebody may have thought it abandoned, and removed it, or
                # made it of another size.
                if is_same(fd, folder / "users"):
                    return fd, (folder / ARENA).stat().st_size
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _make(folder: Path, size: int) -> None:
    """The arena of a folder that nobody uses: the one of before, if its size is right."""
    path = folder / ARENA
    (folder / _LOCKS).mkdir(exist_ok=True)
    if not path.exists() or path.stat().st_size != size:
        for old in [*folder.glob(f"*/*{_SUFFIX}"), path]:
            old.unlink(missing_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, size)
        os.close(fd)


def _remove_ended(mine: Path) -> None:
    """Removes the arenas beside `mine` whose users are all dead."""
    for folder in mine.parent.glob(PREFIX + "*"):
        if folder == mine:
            continue
        try:
            fd = os.open(folder / "users", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # another user's, or just being made
        try:
            if take(fd):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(fd)
