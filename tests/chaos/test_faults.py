"""Minutes of deaths under load: no answer fails, no answer changes. One run for each fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chaos.benchmark import run_benchmark

pytestmark = [pytest.mark.soak, pytest.mark.cluster]
SEEN_S = 5.0  # a group's death is to be found by then
SECONDS = 300


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "fault", ["rank-kill", "rank-stop", "front-kill", "controller-kill", "gateway-kill"]
)
def test_deaths_fail_no_answer_and_change_none(fault: str, tmp_path: Path) -> None:
    out = tmp_path / "failover.json"
    run_benchmark("failover.py", "--fault", fault, "--seconds", SECONDS, "--out", out)
    found = json.loads(out.read_text())[fault]
    assert (found["altered"], found["failed"]) == (0, 0)
    assert found["equal"] + found["broken_with_their_gateway"] == found["responses"]
    assert found["kills"] >= SECONDS / 60
    if fault in ("rank-kill", "rank-stop"):
        assert found["seen_s"]["of"] == found["kills"]
        assert found["seen_s"]["max"] < SEEN_S


def test_after_the_head_is_lost_the_store_is_enough(tmp_path: Path) -> None:
    run_benchmark("rebuild.py", "--out", tmp_path / "rebuild.json")
