"""Simulated groups take tenants in turn by the engine's own rules, and others' groups don't."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.cluster.simulate import (
    ABUSER,
    SCENARIOS,
    Hardware,
    HashLru,
    Loraplex,
    Trace,
    TracedAdapter,
    TracedRequest,
    compare_abuse,
    generate,
    simulate,
)
from loraplex.cluster.simulate.scenarios import make_policy
from loraplex.workers import EngineConfig, Prices, VirtualTokenCounter

GB = 10**9


class FairHash(HashLru):
    """Hashing, in groups that take tenants in turn."""

    fair = True


def drawn(rng: random.Random, tenant: str, adapter: str | None, at_s: float) -> TracedRequest:
    return TracedRequest(at_s, tenant, adapter, rng.randint(1, 600), rng.randint(1, 100))


@given(st.integers(0, 10**6), st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_a_single_tenant_is_served_as_its_requests_come(seed, rows):
    rng = random.Random(seed)
    times = sorted(rng.uniform(0, 3) for _ in range(60))
    trace = Trace((), tuple(drawn(rng, "t", None, at) for at in times))
    hardware = Hardware(max_running=rows)
    fair = simulate(trace, FairHash(), 1, hardware)
    assert fair.served == simulate(trace, HashLru(), 1, hardware).served
    by_arrival = sorted(fair.served, key=lambda s: s.at_s)
    firsts = [s.at_s + s.ttft_s for s in by_arrival]
    assert firsts == sorted(firsts)


@given(st.integers(0, 10**6), st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_work_for_two_tenants_who_wait_stays_within_the_bound(seed, room):
    """Also where they have more adapters than the pool has room for; one sends first, and most."""
    rng = random.Random(seed)
    ranks = {f"{t}/{i}": rng.choice((8, 16, 64)) for t in ("busy", "calm") for i in range(2)}
    adapters = tuple(TracedAdapter(key, GB, rank) for key, rank in ranks.items())
    sent = [("busy", 0.0)] * 500 + [("calm", 0.1)] * 150
    requests = [drawn(rng, t, rng.choice([f"{t}/0", f"{t}/1", None]), at) for t, at in sent]
    hardware = Hardware(max_running=6, pool_bytes=room * GB)
    prices, slack = Prices(), EngineConfig.overtake_slack
    most = 6 * prices.tokens(600, 100, 64) + prices.load(GB)
    bound = 2 * (most + slack + slack)
    gaps: list[float] = []

    class Watched(VirtualTokenCounter):
        """Notes how far apart the two are, from when both wait until one doesn't."""

        def __init__(self, credit: float) -> None:
            super().__init__(credit)
            self.work = defaultdict(float)

        def charge(self, tenant: str, price: float, weight: float) -> None:
            super().charge(tenant, price, weight)
            if not (self.active("busy") and self.active("calm")):
                self.work.clear()
                return
            self.work[tenant] += price
            gaps.append(abs(self.work["busy"] - self.work["calm"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraplex.cluster.simulate.queues.VirtualTokenCounter", Watched)
        outcome = simulate(Trace(adapters, tuple(requests)), FairHash(), 1, hardware)
    assert len(outcome.served) == len(requests)
    assert len(gaps) > 100
    assert max(gaps) <= bound


def test_a_flood_is_the_same_flood_again():
    work = replace(SCENARIOS["abusive"].work, duration_s=10.0, abuse=(2.0, 10.0, 20.0), rate=20.0)
    trace = generate(work, 3)
    hardware = Hardware()
    first, again = (
        simulate(trace, make_policy("loraplex", trace, hardware, 3), 2, hardware) for _ in range(2)
    )
    assert first == again


def test_tenants_below_their_share_keep_what_they_had_beside_a_flood():
    """And lose most of it where requests are served as they come."""
    scenario = SCENARIOS["abusive-group"]
    trace = generate(scenario.work, 1)
    sent = [r.tenant for r in trace.requests if r.at_s >= 60.0]
    assert sent.count(ABUSER) > 2 * (len(sent) - sent.count(ABUSER))
    fair, fcfs = compare_abuse(trace, ABUSER, 1, 60.0, 1, ("loraplex", "loraplex-fcfs"))
    assert fair.throughput >= 0.95
    assert fair.p99_times <= 1.2
    assert fcfs.throughput < 0.8
    assert fcfs.p99_times > 10


def test_a_tenants_waiting_adapters_keep_nobody_else_out():
    """Its two adapters take turns in a pool that has room for one of them; others need none."""
    hardware = Hardware(pool_bytes=GB)
    adapters = (TracedAdapter("a/0", GB), TracedAdapter("a/1", GB))
    mine = [TracedRequest(0.0, "a", f"a/{i % 2}", 10, 50) for i in range(40)]
    others = [TracedRequest(5.0 + i, "b", None, 10, 5) for i in range(5)]
    outcome = simulate(Trace(adapters, (*mine, *others)), Loraplex(), 1, hardware)
    assert len(outcome.served) == 45
    step_s = hardware.step_s(41, 10, 1)
    assert all(s.ttft_s <= 2 * step_s for s in outcome.served if s.tenant == "b")
