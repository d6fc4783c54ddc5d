"""What goes wrong on this node's disk, as an error that says what to do."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator

from .errors import LocalDiskError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turns an OSError into a LocalDiskError: "cannot `doing`: ..."."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free space there" if full else "check its permissions"
        raise LocalDiskError(
            f"cannot {doing}: {error.strerror or error}; {advice}, or choose another folder"
        ) from error


@contextlib.contextmanager
def logged_disk_errors(doing: str) -> Iterator[None]:
    """For what is tried again: an OSError ends it with a warning, "cannot `doing`: ..."."""
    try:
        yield
    except OSError as error:
        logger.warning("cannot %s: %s", doing, error)
