"""What goes wrong on this node's disk, as an error that says what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from .errors import LocalDiskError


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
