"""Groups follow the sequences that they have open."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from loraplex.cluster.errors import SettingsError
from loraplex.cluster.group_scaling import METRIC, ByOpenSequences, wanted_groups
from loraplex.cluster.settings import Settings


def test_wanted_groups_hold_the_load_and_one_fewer_would_not() -> None:
    for _ in range(200):
        loads = [random.randrange(200) for _ in range(random.randrange(1, 9))]
        target = random.uniform(1, 64)
        groups = wanted_groups(loads, target)
        assert sum(loads) <= groups * target + 1e-6
        assert groups == 1 or sum(loads) > (groups - 1) * target - 1e-6
    assert wanted_groups([], 8.0) == 1


def test_the_policy_reads_what_groups_report_and_stays_where_none_did() -> None:
    def context(metrics: Any) -> Any:
        return SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=3)

    policy = ByOpenSequences(target=10.0)
    assert policy(context({METRIC: {"a": 12.0, "b": 19.0}})) == (4, {})
    assert policy(context({METRIC: {"a": 0.0}})) == (1, {})
    for nothing in (None, {}, {METRIC: {}}, {"other": {"a": 50.0}}):
        assert policy(context(nothing)) == (3, {})


def test_fewer_groups_at_most_than_at_least_are_refused() -> None:
    assert Settings.load(groups=2, max_groups=2).max_groups == 2
    with pytest.raises(SettingsError, match=r"^max_groups = 1: must be at least groups = 2"):
        Settings.load(groups=2, max_groups=1)
