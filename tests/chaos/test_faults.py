"""Minutes of deaths under load: no answer fails, no answer changes. One run for each fault."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.soak, pytest.mark.cluster]
ROOT = Path(__file__).resolve().parents[2]
SEEN_S = 5.0  # a group's death is to be found by then
SECONDS = 300


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "fault", ["rank-kill", "rank-stop", "front-kill", "controller-kill", "gateway-kill"]
)
def test_deaths_fail_no_answer_and_change_none(fault: str, tmp_path: Path) -> None:
    out = tmp_path / "failover.json"
    command = [sys.executable, ROOT / "benchmarks/failover.py", "--fault", fault]
    command += ["--seconds", str(SECONDS), "--out", out]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(out.read_text())[fault]
    assert (found["altered"], found["failed"]) == (0, 0)
    assert found["equal"] + found["broken_with_their_gateway"] == found["responses"]
    assert found["kills"] >= SECONDS / 60
    if fault in ("rank-kill", "rank-stop"):
        assert found["seen_s"]["of"] == found["kills"]
        assert found["seen_s"]["max"] < SEEN_S


def test_after_the_head_is_lost_the_store_is_enough(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks/rebuild.py", "--out", tmp_path / "rebuild.json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
