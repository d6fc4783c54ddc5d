"""Groups follow the wait that a new request is to expect."""

from __future__ import annotations

import random
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from loraplex.cluster.errors import SettingsError
from loraplex.cluster.group_scaling import (
    ByExpectedWait,
    GroupWork,
    Scaling,
    expected_wait_s,
    wanted_groups,
)
from loraplex.cluster.settings import Settings
from loraplex.cluster.worker_group import WorkerGroupConfig, worker_group_app
from loraplex.workers import EngineReport

from tests.workers.fake_group import FakeProgram


def some_works() -> list[GroupWork]:
    return [
        GroupWork(
            random.choice([0.0, random.uniform(0, 20)]),
            random.choice([0.0, random.uniform(0, 400)]),
            rows=64,
            end_s=random.choice([0.0, random.uniform(0, 1)]),
        )
        for _ in range(random.randrange(1, 9))
    ]


def test_wanted_groups_keep_the_target_and_one_fewer_would_not() -> None:
    for _ in range(500):
        works, target, most = some_works(), random.uniform(0.1, 5), random.randrange(1, 20)
        groups = wanted_groups(works, 1, target, most)
        assert 1 <= groups <= most
        assert groups == most or expected_wait_s(works, groups) <= target
        assert groups == 1 or expected_wait_s(works, groups - 1) > target


def test_groups_are_taken_away_only_where_the_others_would_wait_much_less() -> None:
    for _ in range(500):
        works, target, now = some_works(), random.uniform(0.1, 5), random.randrange(1, 12)
        groups = wanted_groups(works, now, target, 12)
        if groups < now:
            assert expected_wait_s(works, groups) <= target / 2
        # The same load asks for no further change.
        assert wanted_groups(works, groups, target, 12) == groups


def test_waiting_prompts_and_full_groups_ask_for_more_and_many_short_requests_dont() -> None:
    idle = GroupWork(0.0, 0.0, 64, 0.01)
    assert wanted_groups([idle] * 4, 4, 1.0, 8) == 1
    prompts = GroupWork(6.0, 3.0, 64, 0.01)
    assert wanted_groups([prompts], 1, 1.0, 8) == 8  # 8 s of prompts, with the headroom
    rows = GroupWork(0.0, 96.0, 64, 0.1)  # 128 for 64 rows
    assert wanted_groups([rows], 1, 1.0, 8) == 2
    short = GroupWork(0.0, 96.0, 64, 0.001)  # as many, but 65 of them end in 65 ms
    assert wanted_groups([short], 1, 1.0, 8) == 1


def test_the_policy_reads_what_groups_report_and_stays_where_none_did() -> None:
    def context(metrics: Any) -> Any:
        return SimpleNamespace(
            aggregated_metrics=metrics, target_num_replicas=3, capacity_adjusted_max_replicas=6
        )

    def metrics(**works: GroupWork) -> dict[str, dict[str, float]]:
        names = works[min(works)].to_metrics()
        return {n: {r: w.to_metrics()[n] for r, w in works.items()} for n in names}

    busy = EngineReport(
        running=60, queued=60, max_running=60, prompt_tokens_pending=3000, token_s=0.001, end_s=0.05
    )
    assert GroupWork.of(busy) == GroupWork(3.0, 120, 60, 0.05)
    policy = ByExpectedWait(target_wait_s=1.0)
    assert policy(context(metrics(a=GroupWork.of(busy), b=GroupWork.of(busy)))) == (6, {})
    assert policy(context(metrics(a=GroupWork.of(EngineReport(max_running=60))))) == (1, {})
    partial = metrics(a=GroupWork.of(busy))
    del partial["rows"]["a"]
    for nothing in (None, {}, partial, {"other": {"a": 50.0}}):
        assert policy(context(nothing)) == (3, {})


def test_fewer_groups_at_most_than_at_least_are_refused() -> None:
    assert Settings.load(groups=2, max_groups=2).max_groups == 2
    with pytest.raises(SettingsError, match=r"^max_groups = 1: must be at least groups = 2"):
        Settings.load(groups=2, max_groups=1)


@pytest.mark.parametrize("up_after_s", [0.1, 2.0, 30.0])
def test_serve_takes_every_delay_without_a_warning(up_after_s: float) -> None:
    config = WorkerGroupConfig("groups", FakeProgram(), b"secret")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        worker_group_app(config, 1, Scaling(max_groups=2, up_after_s=up_after_s))
