"""The simulator: the same seed gives the same run, every request ends once, and time adds up."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.cluster.simulate import (
    POLICIES,
    SCENARIOS,
    Fault,
    Hardware,
    HashLru,
    Loraplex,
    RayMultiplex,
    SimulationError,
    StepCosts,
    Trace,
    TracedAdapter,
    TracedRequest,
    TraceError,
    TwoChoices,
    Workload,
    bars,
    compare,
    floor,
    generate,
    load_trace,
    save_trace,
    simulate,
    summarize,
)
from loraplex.cluster.simulate.dynamo import place, replica_counts
from loraplex.cluster.simulate.generate import popularity
from loraplex.cluster.simulate.scenarios import make_policy
from loraplex.cluster.simulate.tiers import ByteCache

GB = 10**9


def small(seed: int, **changes) -> Trace:
    work = Workload("t", adapters=12, rate=12.0, duration_s=12.0, tenants=4, base_share=0.1)
    return generate(replace(work, **changes), seed)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_gives_the_same_run(policy):
    hardware = Hardware()
    trace = small(5, cv=4.0, deaths=((5.0, 1),))
    assert trace == small(5, cv=4.0, deaths=((5.0, 1),))
    assert trace != small(6, cv=4.0, deaths=((5.0, 1),))
    first, again = (
        simulate(trace, make_policy(policy, trace, hardware, 3), 3, hardware) for _ in range(2)
    )
    assert first == again


@given(st.integers(0, 10**6), st.sampled_from(POLICIES), st.data())
@settings(max_examples=15, deadline=None)
def test_every_request_ends_once_with_all_its_tokens(seed, policy, data):
    """Also when groups die, and when all of them are dead for a while."""
    deaths = tuple((data.draw(st.floats(0, 12)), g) for g in data.draw(st.sets(st.integers(0, 2))))
    trace = small(seed, cv=data.draw(st.sampled_from([1.0, 4.0])), deaths=deaths)
    outcome = simulate(trace, make_policy(policy, trace, Hardware(), seed), 3)
    assert Counter((s.at_s, s.adapter, s.output_tokens) for s in outcome.served) == Counter(
        (r.at_s, r.adapter, r.output_tokens) for r in trace.requests
    )
    for s in outcome.served:
        assert 0 < s.ttft_s <= s.end_s - s.at_s + 1e-9
        assert s.groups


def requests(*rows: tuple[float, str | None, int, int]) -> tuple[TracedRequest, ...]:
    return tuple(TracedRequest(at, "t", key, prompt, out) for at, key, prompt, out in rows)


def test_time_adds_up_by_hand():
    """Two requests of one adapter and one of the base model, on one group, step by step."""
    hw = Hardware(gpu_bytes_s=2 * GB, disk_bytes_s=GB, s3_bytes_s=GB / 2, s3_latency_s=0.25)
    trace = Trace(
        (TracedAdapter("t/a", GB),),
        requests((0.0, "t/a", 100, 3), (0.1, None, 50, 2), (2.6, "t/a", 40, 1)),
    )
    served = {s.at_s: s for s in simulate(trace, HashLru(), 1, hw).served}
    # The base model's request needs no load: a prefill step, then one that decodes.
    base_first = 0.1 + hw.step_s(0, 50, 0)
    assert served[0.1].ttft_s == pytest.approx(base_first - 0.1)
    assert served[0.1].end_s == pytest.approx(base_first + hw.step_s(1, 0, 0))
    # 1 GB: 2 s from the store and its latency, 0.5 s to the GPU.
    loaded = 2.0 + 0.25 + 0.5
    # Both requests wait for it, and share the prefill step.
    first = loaded + hw.step_s(0, 140, 1)
    assert served[0.0].ttft_s == pytest.approx(first)
    assert served[2.6].end_s == pytest.approx(first)
    assert served[0.0].end_s == pytest.approx(first + 2 * hw.step_s(1, 0, 1))


def test_an_arrival_waits_for_the_step_that_runs_and_no_longer():
    hw = Hardware()
    trace = Trace((), requests((0.0, None, 10, 1000), (1.0, None, 10, 1)))
    served = {s.at_s: s for s in simulate(trace, HashLru(), 1, hw).served}
    prefill, decode = hw.step_s(0, 10, 0), hw.step_s(1, 0, 0)
    steps = -(-(1.0 - prefill) // decode)
    begun = prefill + steps * decode
    assert served[1.0].end_s == pytest.approx(begun + hw.step_s(1, 10, 0))


def test_a_dead_groups_requests_go_on_elsewhere_with_the_tokens_they_have():
    hw = Hardware()
    trace = Trace((), requests((0.0, None, 10, 500)), (Fault(1.0, 0),))
    (served,) = simulate(trace, HashLru(), 2, hw).served
    assert served.groups == ("g000", "g001")
    prefill, decode = hw.step_s(0, 10, 0), hw.step_s(1, 0, 0)
    assert served.ttft_s == pytest.approx(prefill)
    done = 1 + int((1.0 - prefill) / decode)
    again = 1.0 + hw.step_s(0, 10 + done, 0)
    assert served.end_s == pytest.approx(again + (500 - done - 1) * decode)


def test_a_pool_never_holds_more_than_it_has_and_never_drops_what_is_used(monkeypatch):
    from loraplex.cluster.simulate.pool import SimPool

    copy = SimPool._copy

    def checked(self, key, asked):
        copy(self, key, asked)
        assert self._used_bytes <= self._hardware.pool_bytes
        held = sum(r.nbytes for r in self._state.values())
        assert held + sum(self._sizes[k] for k in self._copying) == self._used_bytes

    monkeypatch.setattr(SimPool, "_copy", checked)
    trace = small(random.getrandbits(30), ranks=((8, 0.5), (32, 0.5)), cv=4.0)
    for policy in (Loraplex(), TwoChoices(1)):
        simulate(trace, policy, 2)


def test_hashing_has_one_home_an_adapter():
    outcome = simulate(small(1, base_share=0.0), HashLru(), 4)
    homes: dict[str | None, set] = {}
    for s in outcome.served:
        homes.setdefault(s.adapter, set()).add(s.groups)
    assert all(len(groups) == 1 for groups in homes.values())
    assert len({g for groups in homes.values() for g in groups}) > 1


def test_rays_rule_takes_a_holder_until_it_is_full_then_the_one_with_fewest_models():
    hw = Hardware(max_running=2)
    adapters = (TracedAdapter("t/a", GB), TracedAdapter("t/b", GB))
    rows = [
        (0.0, "t/a", 10, 4000),
        (0.1, "t/b", 10, 4000),
        *[(9.0 + i, "t/a", 10, 4000) for i in range(2)],
    ]
    outcome = simulate(Trace(adapters, requests(*rows)), RayMultiplex(1), 3, hw)
    first, other, second, third = (
        next(s.groups[0] for s in outcome.served if s.at_s == at) for at, *_ in rows
    )
    assert second == first
    assert third not in (first, other)


def test_dynamos_counts_follow_the_share_of_the_slots():
    assert replica_counts({"a": 60, "b": 30, "c": 10}, 12, 5) == {"a": 5, "b": 4, "c": 2}
    assert replica_counts({"a": 60, "b": 30, "c": 10}, 6, 5) == {"a": 3, "b": 2, "c": 1}
    assert replica_counts({"a": 1, "b": 1}, 1, 4) == {"a": 1, "b": 1}
    assert replica_counts({}, 8, 2) == {}


def test_dynamos_placement_keeps_prior_workers_and_skips_full_ones():
    workers = [f"w{i}" for i in range(4)]
    prior = {"a": ("w1", "w3")}
    placed = place({"a": 2, "b": 1, "c": 4}, prior, workers, slots=2)
    assert set(placed["a"]) == {"w1", "w3"}
    assert len(placed["c"]) == 4
    usage = Counter(w for names in placed.values() for w in names)
    assert max(usage.values()) <= 2
    assert all(len(names) == 1 for names in place({"a": 1, "b": 1}, {}, ["w"], 1).values())


def test_byte_caches_drop_the_oldest_and_kept_ones_last():
    cache = ByteCache(30)
    for key in "abc":
        cache.put(key, 10)
    cache.kept = frozenset("a")
    cache.put("d", 10)
    assert list(cache.entries) == ["a", "c", "d"]
    cache.touch("c")
    cache.put("e", 20)
    assert list(cache.entries) == ["a", "e"]
    cache.put("f", 31)
    assert "f" not in cache.entries


def test_popularity_is_what_was_asked_for():
    work = Workload("t", adapters=100, rate=1.0, duration_s=1.0)
    for changes in ({"zipf": 0.0}, {"power": 1.0}):
        assert popularity(replace(work, **changes)) == pytest.approx([0.01] * 100)
    assert popularity(replace(work, zipf=1.5))[0] == pytest.approx(0.414, abs=0.01)
    # P(floor(100 u) = 0) for u with density 0.1 u^-0.9 is 0.01^0.1.
    assert popularity(replace(work, power=0.1))[0] == pytest.approx(0.01**0.1)
    for s in (0.6, 1.0, 1.5):
        assert sum(popularity(replace(work, zipf=s))) == pytest.approx(1.0)


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_gaps_have_the_variation_that_was_asked_for(cv):
    work = Workload("t", adapters=1, rate=50.0, duration_s=400.0, cv=cv)
    times = [r.at_s for r in generate(work, 11).requests]
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    var = sum((g - mean) ** 2 for g in gaps) / len(gaps)
    assert var**0.5 / mean == pytest.approx(cv, rel=0.15)
    assert len(times) == pytest.approx(20_000, rel=0.1)


def test_phases_change_who_is_asked_for():
    work = Workload("t", adapters=8, rate=100.0, duration_s=60.0, tenants=4)

    def counts(changes, start, end):
        trace = generate(replace(work, **changes), 4)
        return Counter(r.adapter for r in trace.requests if start <= r.at_s < end)

    turns = {"alternate_s": 10.0}
    assert not counts(turns, 0, 10).keys() & counts(turns, 10, 20).keys()
    flash = {"flash": (20.0, 40.0, 2.0)}
    key, n = counts(flash, 20, 40).most_common(1)[0]
    assert n > 0.5 * sum(counts(flash, 20, 40).values())
    assert counts(flash, 0, 20)[key] < 0.2 * n
    drift = {"drift": 3, "zipf": 1.5}
    assert counts(drift, 0, 20).most_common(1)[0][0] != counts(drift, 20, 40).most_common(1)[0][0]
    abuse = {"abuse": (0.0, 60.0, 10.0), "zipf": 0.0}
    by_tenant = Counter(r.tenant for r in generate(replace(work, **abuse), 4).requests)
    assert by_tenant["t000"] == pytest.approx(10 * by_tenant["t001"], rel=0.2)


def test_a_recorded_trace_runs_like_the_one_it_was_made_of(tmp_path):
    trace = small(9, deaths=((3.0, 0),))
    path = tmp_path / "trace.jsonl"
    save_trace(trace, path)
    loaded = load_trace(path)
    assert (loaded.adapters, loaded.requests, loaded.faults) == (
        trace.adapters,
        trace.requests,
        trace.faults,
    )
    assert simulate(loaded, HashLru(), 2) == simulate(trace, HashLru(), 2)
    text = path.read_text().splitlines()
    text[3] = text[3].replace('"prompt_tokens"', '"tokens"')
    path.write_text("\n".join(text))
    with pytest.raises(TraceError, match="line 4"):
        load_trace(path)


def test_what_cannot_run_is_said():
    trace = Trace((TracedAdapter("t/a", 99 * GB),), requests((0.0, "t/a", 10, 10)))
    with pytest.raises(SimulationError, match="t/a has 99000000000 bytes, a pool"):
        simulate(trace, HashLru(), 1)
    with pytest.raises(SimulationError, match="groups is 0"):
        simulate(Trace((), ()), HashLru(), 0)
    with pytest.raises(SimulationError, match="KV cache"):
        simulate(Trace((), requests((0.0, None, 10**6, 10))), HashLru(), 1)


def test_figures_of_a_run_by_hand():
    trace = Trace((), requests(*[(float(i), None, 10, 5) for i in range(20)]))
    outcome = simulate(trace, HashLru(), 1)
    summary = summarize(outcome, warmup_s=10.0)
    assert summary.requests == 10
    assert summary.slo == summary.slo_worst_decile == 1.0
    assert (
        summary.p50_ttft_s
        == summary.p99_ttft_s
        == pytest.approx(Hardware().step_s(0, 10, 0), abs=1e-4)
    )
    assert "<svg" in bars({"x": [summary]}, "p99_ttft_s", "title")


def test_the_floor_by_hand():
    adapters = tuple(TracedAdapter(f"t/{k}", GB) for k in "abc")
    rows = [(float(i), f"t/{k}", 1, 1) for i, k in enumerate("abcabc")]
    trace = Trace(adapters, requests(*rows))
    assert floor(trace, 3 * GB).gpu_gb == 3.0
    assert floor(trace, 2 * GB).gpu_gb == 4.0  # c goes at once
    assert floor(trace, GB).gpu_gb == 5.0  # a stays
    late = floor(trace, 2 * GB, warmup_s=1.5)
    assert (late.gpu_gb, late.s3_gb) == (2.0, 1.0)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_moves_less_than_the_floor(policy):
    """Where requests hardly wait; and adapters that are new to the store, wherever."""
    seed = random.getrandbits(30)
    hardware = Hardware(pool_bytes=3 * 1_694_498_816)
    for rate, groups in ((1.0, 2), (20.0, 1)):
        trace = small(seed, rate=rate, base_share=0.0)
        moved = simulate(trace, make_policy(policy, trace, hardware, seed), groups, hardware).moved
        least = floor(trace, groups * hardware.pool_bytes)
        assert least.s3_gb <= moved["s3"] / 1e9 + 0.1
        assert least.s3_gb <= moved["gpu"] / 1e9 + 0.1
        if rate == 1.0:
            assert least.gpu_gb <= moved["gpu"] / 1e9 + 0.1


def test_groups_that_share_cores_slow_each_other_down():
    steps = StepCosts(((1, 0.01), (2, 0.01)), ((1, 0.0), (2, 0.0)))
    hw = Hardware(steps=steps, slowdown=(1.0, 3.0), front_s=0.5)
    trace = Trace((), requests((0.0, None, 1, 101), (0.0, None, 1, 1)))
    served = {s.output_tokens: s for s in simulate(trace, HashLru(), 2, hw).served}
    # The second group's step begins beside the first one's, which has its pace already.
    assert served[1].ttft_s == pytest.approx(0.5 + 0.03)
    # Its second step begins after 0.01 s, beside the other; the 98 after it have the cores alone.
    assert served[101].end_s == pytest.approx(0.5 + 0.01 + 0.03 + 99 * 0.01)


def test_groups_of_one_node_fetch_an_adapter_once():
    adapters = (TracedAdapter("t/a", GB),)
    trace = Trace(adapters, requests(*((i * 0.01, "t/a", 10, 10) for i in range(8))))
    for shared, times in ((True, 1), (False, 2)):
        hw = Hardware(shared_node=shared)
        outcome = simulate(trace, TwoChoices(1), 2, hw)
        assert outcome.moved["s3"] == times * GB
        assert outcome.moved["gpu"] == 2 * GB


@pytest.mark.parametrize("name", ["zipf-1", "alternating"])
def test_the_live_policy_moves_half_of_dynamos_bytes_at_a_better_p99(name):
    """Where 8 groups have just room for 32 adapters; the other scenarios are a benchmark's."""
    scenario = SCENARIOS[name]
    trace = generate(scenario.work, 1)
    ours, dynamo = compare(
        trace, scenario.groups, scenario.warmup_s, 1, policies=("loraplex", "dynamo")
    )
    assert ours.p99_ttft_s <= dynamo.p99_ttft_s
    assert ours.slo_worst_decile >= dynamo.slo_worst_decile
    assert ours.gpu_gb + ours.s3_gb <= (dynamo.gpu_gb + dynamo.s3_gb) / 2
