"""Benchmarks for a GPU still run on the engine as it is: their smallest sizes, on the CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def figures(found: Any) -> Iterator[float]:
    """Every number in a JSON document."""
    if isinstance(found, dict | list):
        for part in found.values() if isinstance(found, dict) else found:
            yield from figures(part)
    elif isinstance(found, int | float) and not isinstance(found, bool):
        yield found


@pytest.mark.parametrize("script", ["engine.py", "loading.py"])
def test_it_runs_at_its_smallest_and_writes_its_figures(script: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--tiny", "--device", "cpu", "--out", str(out)]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}  # they import each other
    command = [sys.executable, str(BENCHMARKS / script), *options]
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    shown = list(figures(json.loads(out.read_text())))
    assert len(shown) > 10
    assert all(map(math.isfinite, shown))
