"""The data folder of a service on one machine: its layout, and the lock that gives it one user."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from .errors import ClusterError

# After a kill -9 the watchdog holds the lock until the old run's processes are gone.
_LOCK_WAIT_S = 8.0
# Ray's socket names add 64 characters to the folder's; a Unix socket's name has at most 107.
_MAX_TEMP_CHARS = 24


class DataDirError(ClusterError):
    """The data folder can't be used: not writable, or another service runs on it."""


class DataDir:
    """Where a service keeps what outlives it, and the facts about the run at hand.

    `store/` objects of the embedded store, `packs/` disk tier, `scratch/` uploads being checked,
    `logs/`; `demo.json` (only while the demo serves), `admin.key`, `ray.token`, `lock`.
    """

    def __init__(self, root: Path):
        self.root = Path(os.path.abspath(root))
        self.logs = self.root / "logs"
        self.ray_logs = self.logs / "ray"
        self.store = self.root / "store"
        self.demo_json = self.root / "demo.json"
        self.admin_key = self.root / "admin.key"
        self.ray_token = self.root / "ray.token"
        self._lock_fd = -1

    @property
    def lock_fd(self) -> int:
        return self._lock_fd

    def open(self) -> None:
        """Makes the folder and takes its lock.

        Raises:
            DataDirError: naming the folder, and the process that uses it.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            # Keys lie here, and whatever the tenants upload.
            os.chmod(self.root, 0o700)
            fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DataDirError(
                f"cannot use the data folder {self.root}: {error.strerror}. Choose another with "
                "--data-dir or LORAPLEX_DATA_DIR"
            ) from None
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
                alive = holder.isdigit() and os.path.exists(f"/proc/{holder}")
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    os.close(fd)
                    raise DataDirError(f"cannot lock {self.root}: {error.strerror}") from None
                if alive or time.monotonic() > deadline:
                    os.close(fd)
                    raise DataDirError(
                        f"another loraplex (process {holder or '?'}) uses the data folder "
                        f"{self.root}. Stop it, or choose another folder with --data-dir or "
                        "LORAPLEX_DATA_DIR"
                    ) from None
            time.sleep(0.1)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        self._lock_fd = fd
        # A run whose machine lost power couldn't remove it.
        self.demo_json.unlink(missing_ok=True)

    def close(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def write_private(self, path: Path, text: str) -> None:
        """Replaces a file in one step; only this user can read it."""
        fd, temporary = tempfile.mkstemp(dir=self.root, prefix=f".{path.name}-")
        try:
            with os.fdopen(fd, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    def write_demo(self, facts: dict[str, Any]) -> None:
        self.write_private(self.demo_json, json.dumps(facts, indent=2) + "\n")


def make_run_dir() -> Path:
    """A new private folder with a short name, for Ray's sockets and its workers to stand in."""
    base = tempfile.gettempdir()
    if len(base) > _MAX_TEMP_CHARS:
        base = "/tmp"
    return Path(tempfile.mkdtemp(prefix="lrpx-", dir=base))


def ray_dir(run_dir: Path) -> Path:
    """Ray's own folder in it. Ray opens that one to everybody, and the one above keeps them out:
    a file that somebody else puts where workers stand could be imported by them."""
    return run_dir / "r"
