"""Ten minutes of load while adapters come and go: see benchmarks/soak.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chaos.benchmark import run_benchmark

pytestmark = [pytest.mark.soak, pytest.mark.cluster]
SECONDS = 600


@pytest.mark.timeout(1800)
def test_counts_agree_and_nothing_grows_while_adapters_change(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    run_benchmark("soak.py", "--seconds", SECONDS, "--out", out)
    found = json.loads(out.read_text())
    assert (found["errors"], found["differences"], found["early"]) == (0, {}, {})
    assert found["answers"] > SECONDS
    steps = {"upload_version", "upload_extra", "roll_back", "refused", "delete_extra"}
    assert found["changes"].keys() == steps
    assert min(found["changes"].values()) >= SECONDS / 60
