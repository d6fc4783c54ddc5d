"""Copies in nodes' memory: two of what is asked for, in bytes, and few moves."""

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from loraplex.cluster.control import PlacementConfig
from loraplex.cluster.control.host_copies import plan_host
from loraplex.workers import EngineReport, GroupReport

CONFIG = PlacementConfig(host_bytes_per_tick=1000, host_share=1.0)


def group(name: str, host: dict[str, int], capacity: int = 100, node: str = "") -> GroupReport:
    engine = EngineReport(host_bytes_total=capacity, host=dict(host))
    return GroupReport("d", name, node or f"node of {name}", 1, 2, False, engine)


@st.composite
def clusters(draw):
    sizes = {f"t/{i:02d}": draw(st.integers(1, 40)) for i in range(12)}
    keys = st.sampled_from(sorted(sizes))
    groups = []
    for i in range(draw(st.integers(1, 6))):
        host, room = {}, 100
        for key in draw(st.lists(keys, unique=True, max_size=6)):
            if sizes[key] <= room:
                host[key] = sizes[key]
                room -= sizes[key]
        groups.append(group(f"g{i}", host))
    demand = draw(st.dictionaries(keys, st.floats(0.1, 100)))
    return sizes, groups, demand


@given(clusters(), st.randoms())
def test_memory_suffices_and_the_order_of_groups_does_not_matter(cluster, rng):
    sizes, groups, demand = cluster
    planned = plan_host(groups, demand, sizes, {}, {}, CONFIG)
    for keys in planned.values():
        assert len(set(keys)) == len(keys)
        assert sum(sizes[k] for k in keys) <= 100
    for key in sizes:
        assert sum(key in keys for keys in planned.values()) <= CONFIG.host_copies
    shuffled = rng.sample(groups, len(groups))
    assert plan_host(shuffled, demand, sizes, {}, {}, CONFIG) == planned


@given(clusters())
def test_ticks_come_to_rest_and_the_last_copy_of_what_is_asked_for_stays(cluster):
    sizes, groups, demand = cluster
    planned: dict[str, tuple[str, ...]] = {}
    for _ in range(20):
        before = planned
        planned = plan_host(groups, demand, sizes, {}, planned, CONFIG)
        if planned == before:
            break
        held = {k for g in groups for k in g.engine.host}
        groups = [
            replace(g, engine=replace(g.engine, host={k: sizes[k] for k in planned[g.group]}))
            for g in groups
        ]
        wanted = sum(2 * sizes[k] for k in demand) + sum(sizes.values())
        if wanted <= 100:
            assert held & demand.keys() <= {k for g in groups for k in g.engine.host}
    assert planned == before


def test_what_is_asked_for_gets_two_nodes_and_those_are_kept():
    sizes = {f"t/{i}": 10 for i in range(8)}
    groups = [group(f"g{i}", {}) for i in range(4)]
    demand = {k: float(i + 1) for i, k in enumerate(sizes)}
    planned = plan_host(groups, demand, sizes, {"g2": ["t/0"]}, {}, CONFIG)
    assert all(sum(k in keys for keys in planned.values()) == 2 for k in sizes)
    assert "t/0" in planned["g2"]
    gone = groups[:3]
    after = plan_host(gone, demand, sizes, {}, planned, CONFIG)
    for name in ("g0", "g1", "g2"):
        assert set(planned[name]) <= set(after[name])


def test_groups_of_one_node_count_once():
    sizes = {"t/a": 10}
    groups = [group("g0", {}, node="n"), group("g1", {}, node="n"), group("g2", {}, node="m")]
    planned = plan_host(groups, {"t/a": 1.0}, sizes, {}, {}, CONFIG)
    assert planned == {"g0": ("t/a",), "g2": ("t/a",)}


def test_a_tick_asks_for_no_more_bytes_than_it_may_and_for_lost_copies_first():
    rng = random.Random()
    keys = [f"t/{i:02d}" for i in range(20)]
    sizes = dict.fromkeys(keys, 10)
    lost = rng.choice(keys)
    held = {k: 10 for k in keys if k != lost}
    groups = [group("g0", held, 500), group("g1", {}, 500), group("g2", {}, 500)]
    demand = {k: rng.uniform(1, 9) for k in keys}
    config = replace(CONFIG, host_bytes_per_tick=20)
    planned = plan_host(groups, demand, sizes, {}, {}, config)
    new = [(k, g.group) for g in groups for k in planned[g.group] if k not in g.engine.host]
    assert len(new) == 2
    assert {k for k, _ in new} == {lost}


def test_nodes_without_a_tier_in_memory_get_no_advice():
    assert plan_host([group("g", {}, 0)], {"t/a": 1.0}, {"t/a": 1}, {}, {}, CONFIG) == {}
