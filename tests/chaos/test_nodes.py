"""Several Ray nodes under load: dead nodes, scaling and updates fail no answer and change none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.benchmark import run_benchmark

pytestmark = [pytest.mark.soak, pytest.mark.cluster, pytest.mark.timeout(1200)]
SEEN_S = 5.0  # a node's groups are to be found dead by then


def run(fault: str, rounds: int, out: Path) -> dict[str, Any]:
    run_benchmark("nodes.py", "--fault", fault, "--rounds", rounds, "--out", out)
    found = json.loads(out.read_text())[fault]
    assert (found["altered"], found["failed"]) == (0, 0)
    assert found["equal"] == found["responses"] > 0
    return found


@pytest.mark.parametrize("fault", ["node-kill", "node-stop"])
def test_the_death_of_a_node_is_carried_by_others(fault: str, tmp_path: Path) -> None:
    found = run(fault, 4, tmp_path / "nodes.json")
    assert found["deaths"] == 4 <= found["groups_lost"]
    assert found["seen_s"]["max"] < SEEN_S
    # Half of the deaths leave room for the groups, the others don't before a node comes.
    assert found["elsewhere_s"] is not None
    assert found["after_node_added_s"] is not None


def test_groups_come_and_go_with_the_load(tmp_path: Path) -> None:
    found = run("scale", 2, tmp_path / "nodes.json")
    assert found["groups_added"] >= 2 * (found["groups"] - 1)
    assert min(found["adapters_before_requests"], found["last_copies_handed_over"]) > 0
    assert (found["requests_before_adapters"], found["last_copies_lost"]) == ([], [])


def test_updates_replace_every_group_and_gateway(tmp_path: Path) -> None:
    found = run("update", 2, tmp_path / "nodes.json")
    assert found["updates"] == 2
    assert (found["requests_before_adapters"], found["last_copies_lost"]) == ([], [])
