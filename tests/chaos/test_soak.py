"""Ten minutes of load while adapters come and go: see benchmarks/soak.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.soak, pytest.mark.cluster]
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600


@pytest.mark.timeout(1800)
def test_counts_agree_and_nothing_grows_while_adapters_change(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    command = [sys.executable, ROOT / "benchmarks/soak.py", "--seconds", str(SECONDS)]
    ended = subprocess.run([*command, "--out", out], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(out.read_text())
    assert (found["errors"], found["differences"], found["early"]) == (0, {}, {})
    assert found["answers"] > SECONDS
    steps = {"upload_version", "upload_extra", "roll_back", "refused", "delete_extra"}
    assert found["changes"].keys() == steps
    assert min(found["changes"].values()) >= SECONDS / 60
