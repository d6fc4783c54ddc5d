"""One pack from the store: in parts, checked as they come, and taken up again where it stopped.

What is there so far is a file of the pack's full size and beside it a journal: a line that says of
which object it is, then the number of each part that is there. A journal may claim more than a
crash left of the file: the parts that it names are checked like those that come.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import mmap
import os
import queue
import shutil
import threading
from functools import partial as bind
from pathlib import Path
from typing import Protocol

from .errors import LocalDiskError, PackCorrupt, PackVersionError
from .object_store import ObjectInfo, ObjectStore
from .pack_head import HeadCut, PackHead
from .part_queue import PartQueue
from .single_flight import Wanted

logger = logging.getLogger(__name__)

HEAD_BYTES = 256 << 10  # asked for first: holds most headers, and all of a small pack
PART_BYTES = 16 << 20  # a request's time is small beside it, and it is little to lose
_PAGE = 4096  # of what direct writes want whole
_HEAD = -1  # its number in the journal


class Mirror(Protocol):
    """Memory that a download is written to on its way to the disk."""

    def reserve(self, nbytes: int) -> memoryview | None:
        """Where the pack goes; None: only to the disk."""
        ...

    def complete(self) -> None:
        """All of it is there and checked. The disk may not have it yet."""
        ...

    def release(self) -> None:
        """Nobody reads or writes there any more. Comes last, also after `complete`."""
        ...


class Partial:
    """A pack's file on its way, with its journal. `path` has the pack's size from the start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal = path.with_name(path.name + ".parts")

    def open(self, source: ObjectInfo) -> set[int]:
        """Makes the file, unless a part of this same object is there. Returns the parts in it.

        Raises:
            LocalDiskError: the disk is full; with the sizes.
        """
        identity = json.dumps([source.key, source.etag, source.nbytes])
        with contextlib.suppress(OSError, ValueError):
            lines = self._journal.read_text().splitlines()
            if lines[:1] == [identity] and self.path.stat().st_size == source.nbytes:
                return {int(line) for line in lines[1:]}
        self.remove()
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if source.nbytes:  # of nothing, nothing can be set aside
                os.posix_fallocate(fd, 0, source.nbytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self.remove()
            free = shutil.disk_usage(self.path.parent).free
            raise LocalDiskError(
                f"the disk is full: a pack of {source.nbytes} bytes doesn't fit into the {free} "
                f"bytes that are free in {self.path.parent}; free space there, make the disk cache "
                "smaller, or choose another folder"
            ) from error
        finally:
            os.close(fd)
        self._journal.write_text(identity + "\n")
        return set()

    def note(self, part: int) -> None:
        """A part is in the file."""
        with self._journal.open("a") as file:
            file.write(f"{part}\n")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)

    def finish(self, path: Path) -> None:
        """Gives the file, flushed, its name."""
        flush(self.path)
        self._journal.unlink(missing_ok=True)  # first: nobody would find it alone
        self.path.rename(path)
        flush(path.parent)


class PackDownload:
    """Brings one stored pack into a partial file, and into memory.

    Args:
        source: the object, as listed: its parts are asked for by its ETag, so that no pack is made
            of two objects.
        digest: that the pack must hold.
    """

    def __init__(
        self, store: ObjectStore, source: ObjectInfo, digest: str, partial: Partial
    ) -> None:
        self._store = store
        self._source = source
        self._digest = digest
        self._partial = partial
        self._fd = -1
        self._view = memoryview(b"")
        self._writer: _Writer | None = None  # unless memory is the file's own mapping

    def run(self, parts: PartQueue, wanted: Wanted, mirror: Mirror | None = None) -> None:
        """
        Raises:
            PackCorrupt, PackVersionError: also when asked for a second time.
            PreconditionFailed, NotFound: the object was replaced or removed.
            StoreUnavailable: what has come stays for the next try. FetchCancelled: likewise.
            LocalDiskError: the disk is full.
        """
        if self._source.nbytes == 0:
            raise PackCorrupt(f"the stored {self._source.key} is empty")
        done = self._partial.open(self._source)
        self._fd = os.open(self._partial.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            memory = mirror.reserve(self._source.nbytes) if mirror is not None else None
            if memory is None:
                memory = memoryview(mmap.mmap(self._fd, self._source.nbytes))
            else:
                self._writer = _Writer(self._fd, memory, self._partial)
            self._view = memory
            head, have = self._head(done)
            spans = head.spans(PART_BYTES)
            jobs = [
                bind(self._bring, head, number, start, stop, have, number in done)
                for number, (start, stop) in enumerate(spans)
            ]
            if jobs:
                parts.run(jobs, wanted)
            if mirror is not None and self._writer is not None:
                mirror.complete()
                self._writer.finish()
        finally:
            if self._writer is not None:
                self._writer.end()
            os.close(self._fd)
            self._view = memoryview(b"")
            if mirror is not None:
                mirror.release()

    def _head(self, done: set[int]) -> tuple[PackHead, int]:
        """The header, and how many bytes have come with it."""
        have = min(HEAD_BYTES, self._source.nbytes)
        again = False
        while True:
            self._fill(0, have, _HEAD in done)
            try:
                head = PackHead.parse(self._view[:have], self._source.nbytes, self._where)
                if head.digest != self._digest:
                    raise PackCorrupt(f"{self._where} holds adapter {head.digest}")
            except HeadCut as cut:
                have = cut.nbytes
                continue
            except (PackCorrupt, PackVersionError):  # a flipped bit may look like either
                if again:
                    raise
                again = True
                done.clear()
                continue
            if _HEAD not in done:
                self._keep(_HEAD, 0, have)
            return head, have

    def _bring(
        self, head: PackHead, number: int, start: int, stop: int, have: int, done: bool
    ) -> None:
        """Brings one part; `have` bytes of the pack came with its header."""
        here = stop if done else min(max(have, start), stop)
        for last in (False, True):
            if done:
                self._fill(start, stop, from_file=True)
            if here < stop:
                self._fill(here, stop, from_file=False)
            try:
                head.check(self._view, start, stop)
                break
            except PackCorrupt as error:
                if last:
                    raise
                logger.warning("%s; it is asked for again", error)
                here, done = start, False
        if not done:
            self._keep(number, start, stop)

    def _fill(self, start: int, stop: int, from_file: bool) -> None:
        if not from_file:
            self._store.read_into(
                self._source.key, self._source.etag, start, self._view[start:stop]
            )
        elif self._writer is not None:
            read_at(self._fd, self._view[start:stop], start)

    def _keep(self, number: int, start: int, stop: int) -> None:
        """A part is in memory, and right: it goes to the file, if that isn't the same."""
        if self._writer is not None:
            self._writer.put(number, start, stop)
        else:
            self._partial.note(number)

    @property
    def _where(self) -> Path:
        return Path(self._source.key)


class _Writer:
    """Writes parts to the file behind the download's back: memory doesn't wait for the disk.

    Past the page cache where the file system can, which halves the processor time of a download:
    the pack's readers have it in memory already.
    """

    def __init__(self, fd: int, view: memoryview, partial: Partial) -> None:
        self._fd = fd
        try:
            self._direct = os.open(partial.path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:  # tmpfs and others don't know it
            self._direct = fd
        self._view = view
        self._partial = partial
        self._parts: queue.SimpleQueue[tuple[int, int, int] | None] = queue.SimpleQueue()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="pack-write", daemon=True)
        self._thread.start()

    def put(self, number: int, start: int, stop: int) -> None:
        self._parts.put((number, start, stop))

    def end(self) -> None:
        """Returns when all is written, or nothing will be."""
        if self._thread.is_alive():
            self._parts.put(None)
            self._thread.join()
        self._view = memoryview(b"")
        if self._direct != self._fd:
            os.close(self._direct)
            self._direct = self._fd

    def finish(self) -> None:
        """`end`. Raises OSError: not all is in the file."""
        self.end()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while (part := self._parts.get()) is not None:
                number, start, stop = part
                # Parts begin at whole pages of file and memory; the last one may end within one.
                whole = stop - (stop - start) % _PAGE
                start = self._write(self._direct, start, whole)
                self._write(self._fd, start, stop)
                self._partial.note(number)
        except OSError as error:
            self._error = error

    def _write(self, fd: int, start: int, stop: int) -> int:
        while start < stop:
            start += os.pwrite(fd, self._view[start:stop], start)
        return start


def read_at(fd: int, view: memoryview, at: int) -> None:
    """Fills `view` from the file's bytes from `at` on. Raises PackCorrupt when it ends before."""
    while len(view):
        n = os.preadv(fd, [view], at)
        if n == 0:
            raise PackCorrupt(f"a pack file ends at byte {at}")
        view, at = view[n:], at + n


def flush(path: Path) -> None:
    """Until a file's bytes, or a folder's names, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
