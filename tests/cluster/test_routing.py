"""The choice of a group: placed, bounded, sticky, and the same from every gateway."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.cluster.control import GroupEntry, RoutingTable
from loraplex.cluster.prefix_record import BLOCK_TOKENS, PrefixRecord
from loraplex.cluster.rendezvous import pick
from loraplex.cluster.routing import DEFAULT_POLICY, Ask, GroupLoad
from loraplex.cluster.routing import choose as choose_group
from loraplex.cluster.routing import decide as decide_group

KEY = "tenant/" + "ab" * 32
HASHES = st.integers(0, 2**64 - 1)


# A group that waits a second for each of its requests: the delay is the load, and any spill to a
# group that is faster by more than a load takes is worth it.
def loads_of(load):
    return {name: GroupLoad(n, wait_s=n) for name, n in load.items()}


def decide(table, key, prompt_hash, load, exclude=frozenset()):
    return decide_group(table, Ask(key, prompt_hash), loads_of(load), exclude)


def choose(table, key, prompt_hash, load, exclude=frozenset()):
    return choose_group(table, Ask(key, prompt_hash), loads_of(load), exclude)


def group(name: str, *, draining: bool = False, queued: int = 0, running: int = 0) -> GroupEntry:
    return GroupEntry("workers", name, "127.0.0.1", 1, draining, queued, running)


def table_of(names, placed=(), draining=()) -> RoutingTable:
    groups = tuple(group(n, draining=n in draining) for n in names)
    return RoutingTable(1, 1, groups, {KEY: tuple(placed)} if placed else {})


@st.composite
def situations(draw):
    """(table, load, exclude): any groups, placement that may name groups that are gone."""
    names = [f"g{i}" for i in range(draw(st.integers(1, 8)))]
    names_or_gone = st.sampled_from([*names, "gone"])
    draining = draw(st.sets(st.sampled_from(names)))
    placed = draw(st.lists(names_or_gone, unique=True))
    exclude = draw(st.frozensets(names_or_gone))
    loads = st.floats(0, 200) | st.sampled_from([0.0, 1.0, 50.0])
    load = draw(st.dictionaries(st.sampled_from(names), loads))
    groups = tuple(group(n, draining=n in draining, queued=draw(st.integers(0, 50))) for n in names)
    return RoutingTable(1, 1, groups, {KEY: tuple(placed)}), load, exclude


def candidates(table, load, exclude):
    return {
        g.group: load.get(g.group, g.queued + g.running)
        for g in table.groups
        if not g.draining and g.group not in exclude
    }


@given(situations(), HASHES, st.sampled_from([None, KEY, "tenant/cold"]))
def test_draining_and_excluded_groups_are_never_chosen(situation, prompt, key):
    table, load, exclude = situation
    allowed = candidates(table, load, exclude)
    entry = choose(table, key, prompt, load, exclude)
    assert (entry is None) == (not allowed)
    assert entry is None or entry.group in allowed


@given(situations(), HASHES, st.randoms())
def test_the_order_of_groups_and_of_placement_does_not_matter(situation, prompt, rng):
    table, load, exclude = situation
    groups, placed = list(table.groups), list(table.placement[KEY])
    rng.shuffle(groups)
    rng.shuffle(placed)
    shuffled = replace(table, groups=tuple(groups), placement={KEY: tuple(placed)})
    assert choose(table, KEY, prompt, load, exclude) == choose(shuffled, KEY, prompt, load, exclude)


@given(situations(), HASHES)
def test_a_placed_group_is_chosen_unless_all_of_them_are_overloaded(situation, prompt):
    table, load, exclude = situation
    allowed = candidates(table, load, exclude)
    # Every group's wait is known: where it isn't, waiting at home costs nothing.
    decision = decide(table, KEY, prompt, allowed, exclude)
    if decision is None:
        return
    mean = sum(allowed.values()) / len(allowed)
    bound = DEFAULT_POLICY.bound_factor * mean + DEFAULT_POLICY.bound_slack
    placed = [n for n in table.placement[KEY] if n in allowed]
    assert allowed[decision.entry.group] <= bound
    if any(allowed[n] <= bound for n in placed):
        assert decision.entry.group in placed
        assert decision.reason == "placed"
    else:
        assert decision.reason == ("spill" if placed else decision.reason)


@given(situations(), HASHES)
def test_the_base_model_goes_to_a_least_loaded_group(situation, prompt):
    table, load, exclude = situation
    allowed = candidates(table, load, exclude)
    entry = choose(table, None, prompt, load, exclude)
    if entry is not None:
        waits = {name: (load.get(name, 0.0), n) for name, n in allowed.items()}
        assert waits[entry.group] == min(waits.values())


@given(st.lists(HASHES, min_size=2, max_size=20))
def test_a_cold_adapter_has_one_home_whatever_the_prompt(prompts):
    table = table_of([f"g{i}" for i in range(8)])
    homes = {choose(table, KEY, p, {}).group for p in prompts}
    assert homes == {pick(KEY, [f"g{i}" for i in range(8)])}


@given(st.text(min_size=1), st.sets(st.integers(0, 9), min_size=2), st.data())
def test_a_cold_adapters_home_survives_the_loss_of_another_group(key, members, data):
    names = [f"g{i}" for i in members]
    home = choose(table_of(names), key, 0, {}).group
    lost = data.draw(st.sampled_from([n for n in names if n != home]))
    assert choose(table_of(names), key, 0, {}, {lost}).group == home
    assert choose(table_of([n for n in names if n != lost]), key, 0, {}).group == home


def test_a_cold_adapter_spills_from_an_overloaded_home_to_the_next_in_its_order():
    names = [f"g{i}" for i in range(4)]
    home = pick(KEY, names)
    second = pick(KEY, [n for n in names if n != home])
    decision = decide(table_of(names), KEY, 0, {home: 100.0})
    assert (decision.entry.group, decision.reason) == (second, "spill")


def test_a_placed_adapter_spills_to_its_other_group_before_a_foreign_one():
    table = table_of(["a", "b", "c", "d"], placed=["a", "b"])
    load = {"a": 60.0, "b": 20.0, "c": 0.0, "d": 0.0}
    for prompt in range(50):
        assert choose(table, KEY, prompt, load).group == "b"
    load["b"] = 55.0
    decision = decide(table, KEY, 0, load)
    assert decision.entry.group in ("c", "d")
    assert decision.reason == "spill"


def test_equal_prompts_meet_the_same_copy_and_different_ones_spread():
    placed = ["a", "b", "c", "d"]
    table = table_of([*placed, "e"], placed=placed)
    prompts = [random.getrandbits(64) for _ in range(400)]
    counts = Counter(choose(table, KEY, p, {}).group for p in prompts)
    assert set(counts) == set(placed)
    assert min(counts.values()) > 50
    assert all(choose(table, KEY, p, {}) == choose(table, KEY, p, {}) for p in prompts)


@given(HASHES, st.permutations([0.0, 1.0, 2.0, 3.0, 4.0]))
def test_of_two_copies_the_less_loaded_one_serves_so_the_busiest_never_does(prompt, loads):
    names = ["a", "b", "c", "d", "e"]
    load = dict(zip(names, loads, strict=True))
    busiest = max(load, key=load.__getitem__)
    assert choose(table_of(names, placed=names), KEY, prompt, load).group != busiest


def test_loads_that_a_gateway_knows_win_over_those_in_the_table():
    table = RoutingTable(1, 1, (group("a", queued=9), group("b", running=3)))
    assert choose(table, None, 0, {}).group == "b"
    assert choose(table, None, 0, {"a": 0.0}).group == "a"


def test_a_queue_shorter_than_a_load_is_worth_waiting_in():
    names = ["a", "b", "c"]
    table = replace(table_of(names, placed=["a"]), sizes={KEY: 4_000_000_000}, near={KEY: ("b",)})
    ask = Ask(KEY, 7)
    policy = DEFAULT_POLICY
    load_s = 4_000_000_000 / policy.near_bytes_s + policy.spill_gain_s
    for wait_s, expected in ((load_s - 0.1, "a"), (load_s + 0.1, "b")):
        loads = {"a": GroupLoad(90, wait_s=wait_s), "b": GroupLoad(0), "c": GroupLoad(0)}
        assert choose_group(table, ask, loads).group == expected
    # Where it is resident already, nothing is to be loaded.
    loads = {
        "a": GroupLoad(90, wait_s=0.1),
        "b": GroupLoad(0),
        "c": GroupLoad(0, resident=frozenset({KEY})),
    }
    assert choose_group(table, ask, loads).group == "c"


def test_a_cold_adapter_starts_where_its_pack_is():
    names = [f"g{i}" for i in range(8)]
    for host in names:
        table = replace(table_of(names), near={KEY: (host,)})
        assert decide(table, KEY, 1, {}).entry.group == host
        assert decide(table, KEY, 1, {host: 100.0}).reason == "spill"


@given(HASHES, st.integers(0, 4))
def test_cached_tokens_outweigh_a_wait_that_is_shorter_than_their_prefill(prompt, holder):
    names = ["a", "b", "c", "d", "e"]
    table = table_of(names, placed=names)
    loads = {n: GroupLoad(2, wait_s=0.01, token_s=1e-3) for n in names}
    cached = {names[holder]: 512}
    loads[names[holder]] = GroupLoad(3, wait_s=0.5, token_s=1e-3)
    assert choose_group(table, Ask(KEY, prompt, 600, cached), loads).group == names[holder]
    loads[names[holder]] = GroupLoad(3, wait_s=0.6, token_s=1e-3)
    assert choose_group(table, Ask(KEY, prompt, 600, cached), loads).group != names[holder]


@given(
    HASHES,
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 3000)), min_size=2, max_size=9),
    st.randoms(),
)
def test_a_flood_of_all_groups_changes_nothing_for_others(prompt, crowd, rng):
    """A tenant goes where it would without the flood, however the flood's requests are spread; the
    flood itself goes where its own wait is least."""
    names = [f"g{i}" for i in range(len(crowd))]
    placed = rng.sample(names, rng.randint(1, len(names)))
    table = table_of(names, placed=placed)
    calm, flooded = {}, {}
    for name, (others, flood) in zip(names, crowd, strict=True):
        turn_s = rng.choice([0.01, 0.02, 5.0])
        calm[name] = GroupLoad(others, turn_s, turn_s, 1e-4)
        mine = {"flood": (flood, flood / 10)}
        flooded[name] = GroupLoad(others + flood, turn_s + flood / 10, turn_s, 1e-4, floods=mine)
    for key in (KEY, None):
        ask = Ask(key, prompt, 100, tenant="t")
        assert decide_group(table, ask, flooded) == decide_group(table, ask, calm)
    base = choose_group(table, Ask(None, prompt, 100, tenant="flood"), flooded)
    assert flooded[base.group].floods["flood"][1] == min(f / 10 for _, f in crowd)


@given(HASHES, st.integers(2, 9), st.data())
def test_while_most_groups_have_room_everybody_leaves_a_flooded_one(prompt, n, data):
    names = [f"g{i}" for i in range(n)]
    full = data.draw(st.sets(st.sampled_from(names), max_size=n // 2))
    flood = {"flood": (500, 60.0)}
    loads = {
        name: GroupLoad(505, 60.0, 0.01, floods=flood) if name in full else GroupLoad(5, 0.02, 0.02)
        for name in names
    }
    for tenant in ("t", "flood"):
        ask = Ask(KEY, prompt, 100, tenant=tenant)
        assert choose_group(table_of(names, placed=names), ask, loads).group not in full


def test_one_more_request_delays_a_flood_by_itself_alone():
    load = GroupLoad(50, 9.0, 0.5, 0.001, floods={"f": (40, 8.0)})
    more = load.after("f", 100)
    assert (more.requests_before("f"), more.wait_of("f")) == (51, pytest.approx(8.1))
    assert (more.requests_before("t"), more.wait_of("t")) == (10, 0.5)
    more = load.after("t", 100)
    assert (more.requests_before("t"), more.wait_of("t")) == (11, pytest.approx(0.6))
    # Told of the flood later than of the requests: there are never less than none.
    assert replace(load, requests=3).requests_before("t") == 0


def test_one_more_request_makes_the_next_wait_for_its_prompt():
    load = GroupLoad(2, wait_s=0.5, token_s=0.001, resident={KEY}).after("t", 100)
    assert (load.requests, load.resident) == (3, {KEY})
    assert load.wait_s == 0.6


def test_a_prefix_is_found_where_it_was_sent_and_by_its_owner_alone():
    rng = random.Random()
    record = PrefixRecord()
    prompt = [rng.randrange(50_000) for _ in range(10 * BLOCK_TOKENS + 5)]
    other = [*prompt[: 4 * BLOCK_TOKENS], *(rng.randrange(50_000) for _ in range(300))]
    record.note(record.blocks("t/a", prompt), "g1")
    record.note(record.blocks("t/a", other), "g2")
    assert record.cached(record.blocks("t/a", prompt)) == {
        "g1": 10 * BLOCK_TOKENS,
        "g2": 4 * BLOCK_TOKENS,
    }
    assert record.cached(record.blocks("u/a", prompt)) == {}
    assert record.cached(record.blocks("t/a", prompt[1:])) == {}
    record.forget("g1")
    assert record.cached(record.blocks("t/a", prompt)) == {"g2": 4 * BLOCK_TOKENS}


def test_the_prefix_record_is_bounded_and_keeps_the_newest():
    record = PrefixRecord(max_blocks=50)
    for i in range(100):
        prompt = [i] * (5 * BLOCK_TOKENS)
        record.note(record.blocks("t/a", prompt), "g")
        assert len(record) <= 50
    assert record.cached(record.blocks("t/a", [99] * 320)) == {"g": 320}
    assert record.cached(record.blocks("t/a", [0] * 320)) == {}


def test_a_standby_group_is_asked_for_what_is_placed_on_it_alone():
    names = [f"g{i}" for i in range(4)]
    table = table_of(names)
    table = replace(table, groups=tuple(replace(g, standby=g.group == "g1") for g in table.groups))
    draws = [random.getrandbits(64) for _ in range(50)]
    for prompt_hash in draws:
        assert choose(table, None, prompt_hash, {}).group != "g1"
        assert choose(table, KEY, prompt_hash, {}).group != "g1"
        # Not for what others are too busy with, either.
        busy = {name: 100.0 for name in names if name != "g1"}
        assert choose(table, KEY, prompt_hash, busy).group != "g1"
        placed = replace(table, placement={KEY: ("g1",)})
        assert choose(placed, KEY, prompt_hash, {}).group == "g1"
        # Better than none.
        assert choose(table, KEY, prompt_hash, {}, frozenset(names) - {"g1"}).group == "g1"
        alone = replace(table, groups=tuple(replace(g, standby=True) for g in table.groups))
        assert choose(alone, None, prompt_hash, {}).group in names
