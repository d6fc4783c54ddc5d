"""Locks on files that processes of a node share. All end with their holder, however that ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import FetchCancelled

_POLL_S = 0.01


class PackPin:
    """Keeps a pack where it is, against all processes, until it is closed. A context manager."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: as a tier's `ensure` gave it.

        Raises:
            FileNotFoundError: it isn't there any more.
        """
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self.fd, fcntl.LOCK_SH)
        if not is_same(self.fd, path):  # evicted between open and lock
            self.close()
            raise FileNotFoundError(errno.ENOENT, "the pack was evicted", str(path))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> PackPin:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def evict(path: Path) -> bool:
    """Removes a pack unless it is pinned."""
    fd = lock_unpinned(path)
    if fd is None:
        return not path.exists()
    path.unlink(missing_ok=True)
    os.close(fd)
    return True


def lock_unpinned(path: Path) -> int | None:
    """A descriptor that keeps others from pinning the file; None: it is pinned, or gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if take(fd) and is_same(fd, path):
        return fd
    os.close(fd)
    return None


def take(fd: int) -> bool:
    """Takes the open file's lock for this holder alone, if nobody has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def file_lock(path: Path, wanted: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """One holder on this node. The file is made, and is gone afterwards.

    Raises:
        FetchCancelled: `wanted` said no while another had it.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not take(fd):
                if not wanted():
                    raise FetchCancelled(f"nobody waits for {path.name} any more")
                time.sleep(_POLL_S)
            if is_same(fd, path):
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


@contextlib.contextmanager
def try_file_lock(path: Path) -> Iterator[bool]:
    """`file_lock` for who doesn't wait: gives whether it got the lock."""
    try:
        with file_lock(path, lambda: False):
            yield True
    except FetchCancelled:
        yield False


def is_same(fd: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
