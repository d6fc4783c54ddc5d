"""Scratch folders that are removed also when the process that made them was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import LocalDiskError

_PREFIX = "ingest-"
_LOCK = ".lock"


@contextlib.contextmanager
def workspace(parent: Path) -> Iterator[Path]:
    """A new folder below `parent`, gone at the end.

    Raises:
        LocalDiskError: it can't be made, or the disk is full while it is in use.
    """
    folder = None
    lock = -1
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    except OSError as error:
        raise LocalDiskError(
            f"cannot work in the scratch folder {parent}: {error.strerror or error}. Free space "
            "there, or choose another folder"
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


def sweep_workspaces(parent: Path) -> int:
    """Removes the folders whose makers are dead; returns how many."""
    removed = 0
    for folder in parent.glob(_PREFIX + "*"):
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # just being made, or just being removed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
        except OSError:
            pass  # in use
        finally:
            os.close(lock)
    return removed
