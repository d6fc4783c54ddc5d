"""Ends every process of a local run once its parent has gone, however that happened.

`Watchdog` (used by `loraplex up` and `serve`) starts this same file as a separate, tiny process.
The two share a pipe: when the parent exits, also by kill -9, the pipe closes, and the watchdog
ends whatever the run has left, removes its temporary folder and copies Ray's logs to where the
user looks for them. It holds the data folder's lock meanwhile, so no second run starts too early.

A run's processes are those whose working directory is in the run's folder: Ray's daemons and
workers and the object store inherit it from the parent, and no title or environment they set
hides it. The script part uses the standard library only and imports nothing of this package.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

# Ray's daemons notice by themselves that their driver is gone; signals follow if they don't.
_ALONE_S = 0.5
_TERM_S = 3.0
_KILL_S = 15.0
_POLL_S = 0.05


def processes_in(folder: str | Path) -> list[int]:
    """Ids of this user's living processes whose working directory is `folder` or in it."""
    root = os.path.realpath(folder)
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        # Not ours, gone meanwhile, or a zombie: there is nothing to end.
        with contextlib.suppress(OSError):
            cwd = os.readlink(f"/proc/{entry}/cwd").removesuffix(" (deleted)")
            if cwd == root or cwd.startswith(root + "/"):
                found.append(int(entry))
    return found


def end_processes(folder: str | Path, spare: Iterable[int] = ()) -> list[int]:
    """Ends the processes of `folder`: waits, then SIGTERM, then SIGKILL until none is left.

    Returns those that needed a signal.
    """
    spared = set(spare)
    signalled: set[int] = set()
    start = time.monotonic()
    while True:
        left = [pid for pid in processes_in(folder) if pid not in spared]
        waited = time.monotonic() - start
        if not left or waited > _KILL_S:
            return sorted(signalled)
        if waited > _ALONE_S:
            for pid in left:
                if waited > _TERM_S:
                    _send(pid, signal.SIGKILL)
                elif pid not in signalled:
                    _send(pid, signal.SIGTERM)
                signalled.add(pid)
        time.sleep(_POLL_S)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


class Watchdog:
    """The parent's end.

    Args:
        folder: the run's temporary folder; removed at the end.
        ray_folder: Ray's part of it.
        logs: where Ray's logs are copied to.
        remove: a file that must not outlive the run.
        keep_fd: a descriptor the watchdog holds open (the data folder's lock).
        memory: folder of the run's shared memory; removed at the end.
    """

    def __init__(
        self,
        folder: Path,
        ray_folder: Path,
        logs: Path,
        remove: Path,
        keep_fd: int,
        memory: Path | None = None,
    ):
        read_fd, self._write_fd = os.pipe()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", __file__),
                *(str(read_fd), str(folder), str(ray_folder), str(logs), str(remove)),
                *([str(memory)] if memory is not None else []),
            ],
            pass_fds=(read_fd, keep_fd),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd="/",
            # Ctrl-C reaches the terminal's whole process group; this process must outlive it.
            start_new_session=True,
        )
        os.close(read_fd)

    @property
    def pid(self) -> int:
        return self._process.pid

    def finish(self, timeout_s: float = 25.0) -> None:
        """Lets the watchdog clean up and waits for it. Does nothing the second time."""
        if self._write_fd >= 0:
            os.close(self._write_fd)
            self._write_fd = -1
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)


def _copy_logs(ray_folder: str, logs: str) -> None:
    current = os.path.join(ray_folder, "session_latest", "logs")
    if os.path.islink(logs):
        os.unlink(logs)
    if os.path.isdir(current):
        shutil.rmtree(logs, ignore_errors=True)
        shutil.copytree(current, logs, symlinks=True, ignore_dangling_symlinks=True)


def _watch(
    read_fd: int, folder: str, ray_folder: str, logs: str, remove: str, *memory: str
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    while os.read(read_fd, 1):
        pass
    with contextlib.suppress(FileNotFoundError):
        os.unlink(remove)
    # A parent that ends in an orderly way stands in the folder too, and waits for this process.
    end_processes(folder, spare=[parent] if os.getppid() == parent else [])
    with contextlib.suppress(OSError, shutil.Error):
        _copy_logs(ray_folder, logs)
    for left in (folder, *memory):
        shutil.rmtree(left, ignore_errors=True)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), *sys.argv[2:])
