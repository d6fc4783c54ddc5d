"""A child process that can't outlive this one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


class OwnedProcess:
    """Runs a program in a session of its own, away from the terminal's Ctrl-C.

    On Linux the kernel kills it when this process dies, however that happens.

    Args:
        log: file that its output is appended to.

    Raises:
        OSError: it can't be started.

    Attributes:
        pid: of the process, also after its end.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._arguments = arguments
        self._environment = environment
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: BaseException | None = None
        self._started = threading.Event()
        # The kernel's "kill me when my parent dies" means the parent *thread*: were it the
        # caller's, a process started from a short-lived thread would die with that.
        self._keeper = threading.Thread(target=self._keep, name="owned-process", daemon=True)
        self._keeper.start()
        self._started.wait()
        if self._process is None:
            assert self._failure is not None
            raise self._failure
        self.pid = self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status, None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def end(self, timeout_s: float) -> None:
        """Ends it: with SIGTERM, and with SIGKILL after `timeout_s`."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        self._keeper.join(timeout_s)
        if self._keeper.is_alive():
            self._process.kill()
            self._keeper.join()

    def _keep(self) -> None:
        try:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._arguments,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_die_with_parent(),
                )
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._started.set()
        self._process.wait()


def _die_with_parent() -> Callable[[], None] | None:
    """What the child does between fork and exec. All that it needs is loaded before."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent, kill = ctypes.CDLL(None).prctl, os.getpid(), int(signal.SIGKILL)

    def apply() -> None:
        prctl(_PR_SET_PDEATHSIG, kill, 0, 0, 0)
        if os.getppid() != parent:  # it died before that
            os._exit(1)

    return apply
