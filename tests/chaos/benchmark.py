"""Benchmarks as their users start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_benchmark(file: str, *arguments: object) -> None:
    """Raises AssertionError with what it printed when it fails.

    Args:
        file: its name in benchmarks/.
    """
    command = [sys.executable, ROOT / "benchmarks" / file, *map(str, arguments)]
    # Tests are not to find modules beside themselves; a benchmark's helpers lie beside it.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert ended.returncode == 0, ended.stdout + ended.stderr
