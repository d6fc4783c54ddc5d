"""Rendezvous hashing: the same everywhere, even, and stable when nodes come and go."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from loraplex.cluster.rendezvous import name_hash, pick, rank, score

NAMES = st.text(min_size=1, max_size=12)
NODES = st.lists(NAMES, min_size=1, max_size=12, unique=True)

# Groups of the first adapters; gateways of two versions must agree during an upgrade.
GOLDEN = ["group-a", "group-a", "group-b", "group-d", "group-a", "group-a", "group-d", "group-c"]


@given(NAMES, NODES, st.randoms())
def test_the_order_of_the_nodes_does_not_matter(key, nodes, random):
    shuffled = list(nodes)
    random.shuffle(shuffled)
    assert rank(key, nodes) == rank(key, shuffled)
    assert pick(key, nodes) == pick(key, shuffled) == rank(key, nodes)[0]


@given(NAMES, NODES, NAMES)
def test_a_node_that_leaves_or_joins_does_not_reorder_the_others(key, nodes, other):
    with_other = rank(key, {*nodes, other})
    assert [n for n in with_other if n != other] == rank(key, set(nodes) - {other})


def test_values_never_change_between_processes_or_versions():
    nodes = ["group-a", "group-b", "group-c", "group-d"]
    assert [pick(f"tenant/{i:064x}", nodes) for i in range(8)] == GOLDEN


def test_keys_spread_evenly_and_a_joining_node_takes_only_its_share():
    nodes = [f"group-{i}" for i in range(8)]
    keys = [f"tenant/{i}" for i in range(8000)]
    before = {key: pick(key, nodes) for key in keys}
    counts = Counter(before.values())
    assert all(850 < counts[node] < 1150 for node in nodes)  # 1000 each, deviation about 30
    after = {key: pick(key, [*nodes, "new"]) for key in keys}
    moved = [key for key in keys if after[key] != before[key]]
    assert all(after[key] == "new" for key in moved)
    assert 730 < len(moved) < 1050  # a ninth


def test_a_number_is_taken_as_the_hash_itself():
    nodes = ["a", "b", "c"]
    assert len({pick(h, nodes) for h in range(64)}) == 3


def test_no_nodes():
    assert pick("key", []) is None
    assert rank("key", []) == []


def test_many_nodes_rank_by_the_same_scores_as_few():
    rng = random.Random()
    nodes = [f"node-{rng.getrandbits(40):x}" for _ in range(100)]
    for key in (rng.getrandbits(64), "tenant/digest"):
        key_hash = name_hash(key) if isinstance(key, str) else key
        by_score = sorted(nodes, key=lambda n: -score(key_hash, n))
        assert rank(key, nodes) == by_score
        assert rank(key, rng.sample(nodes, 100)) == by_score
        few = rng.sample(nodes, 10)
        assert rank(key, few) == [n for n in by_score if n in few]
        assert rank(key, nodes)[0] == pick(key, nodes)
