"""`loraplex up` in a process group of its own, for tests to start, watch and end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
DEMO = Path(os.environ.get("LORAPLEX_DEMO_DIR") or ROOT / "deploy/demo")
READY_S = 180.0  # one busy core; the product's own goal is measured by the benchmarks
STOP_S = 30.0


class Up:
    """One `loraplex up` in a process group of its own, as a shell would run it."""

    def __init__(self, data: Path, port: int, *args: str, **env: str):
        self.data = data
        self.port = port
        self.log = data.parent / f"up-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "loraplex.cluster.cli", "up"]
        command += ["--port", str(port), "--data-dir", str(data), "--demo-dir", str(DEMO), *args]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=data.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **env},
            )
        self.seen: dict[int, psutil.Process] = {}

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def tree(self) -> list[psutil.Process]:
        """The process and all below it; what was ever seen is remembered."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            for process in [root, *root.children(recursive=True)]:
                self.seen.setdefault(process.pid, process)
        return [p for p in self.seen.values() if alive(p)]

    def wait_until(self, condition: Callable[[], object], what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            self.tree()
            assert self.process.poll() is None, f"up ended before {what}:\n{self.output()}"
            assert time.monotonic() < deadline, f"no {what} in time:\n{self.output()}"
            time.sleep(0.1)

    def wait_ready(self) -> dict:
        demo = self.data / "demo.json"
        self.wait_until(demo.exists, "demo.json", READY_S)
        self.tree()
        return json.loads(demo.read_text())

    def wait_gone(self, timeout_s: float = STOP_S) -> None:
        deadline = time.monotonic() + timeout_s
        while left := self.tree():
            # The parent's exit must be collected, or it stays as a zombie.
            self.process.poll()
            assert time.monotonic() < deadline, f"still there: {left}\n{self.output()}"
            time.sleep(0.1)

    def kill_everything(self) -> None:
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(10)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
