"""The waits that a group tells: bounded by the whole queue's, short for who doesn't flood it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.workers import Backlog, Pace, VirtualTokenCounter, Waits, expected_waits
from loraplex.workers.fair_queue import FairQueue
from loraplex.workers.turns import TOLD_FLOODS

SEEDS = st.integers(0, 2**32)


def paced(step_s: float = 0.01, token_s: float = 1e-4, end_s: float = 0.05) -> Pace:
    pace = Pace()
    pace.step_s, pace.token_s, pace.end_s = step_s, token_s, end_s
    return pace


def counters(of: dict[str, float], floor: float) -> VirtualTokenCounter:
    """Tenants whose counters stand at these, and the floor at its place."""
    vtc = VirtualTokenCounter()
    for tenant, counter in of.items():
        vtc.charge(tenant, counter, 1.0)
    vtc.floor = floor
    return vtc


def drawn(seed: int) -> tuple[dict[str, Backlog], VirtualTokenCounter, Pace, int, int]:
    rng = random.Random(seed)
    tenants = [f"t{i}" for i in range(rng.randrange(9))]
    backlogs: dict[str, Backlog] = {}
    for t in tenants:
        queued, running = rng.choice([0, 0, 1, 300]), rng.randrange(5)
        prompts = queued + (rng.randrange(running + 1) if running else 0)
        tokens = sum(rng.randint(1, 900) for _ in range(prompts))
        if queued + running:
            backlogs[t] = Backlog(queued + running, queued, tokens, rng.choice([0.5, 1.0, 3.0]))
    floor = rng.uniform(0, 10_000)
    vtc = counters({t: max(0.0, floor + rng.gauss(0, 5000)) for t in tenants}, floor)
    pace = paced(rng.random(), rng.random() / 1000, rng.random())
    return backlogs, vtc, pace, rng.choice([8, 64]), rng.choice([128, 2048])


@given(SEEDS)
def test_no_flood_waits_longer_than_if_it_came_after_everything(seed):
    backlogs, vtc, pace, rows, step_tokens = drawn(seed)
    waits = expected_waits(backlogs, vtc, pace, rows, step_tokens)
    running = sum(b.open - b.queued for b in backlogs.values())
    tokens, queued = (sum(getattr(b, x) for b in backlogs.values()) for x in ("tokens", "queued"))
    assert waits.all_s == pytest.approx(pace.wait_s(tokens, queued, rows - running))
    assert len(waits.floods) <= TOLD_FLOODS
    for tenant, (count, own_s) in waits.floods.items():
        assert count == backlogs[tenant].open
        assert backlogs[tenant].queued
        assert not vtc.behind(tenant)
        alone = pace.wait_s(backlogs[tenant].tokens, backlogs[tenant].queued, rows - running)
        assert alone - 1e-9 <= own_s <= waits.all_s + 1e-9


@given(SEEDS)
def test_the_longest_queues_are_told_first(seed):
    backlogs, vtc, pace, rows, step_tokens = drawn(seed)
    told = expected_waits(backlogs, vtc, pace, rows, step_tokens).floods
    least = min((backlogs[t].tokens for t in told), default=0)
    could = {t for t, b in backlogs.items() if b.queued and not vtc.behind(t)}
    assert told.keys() <= could
    assert len(told) == min(TOLD_FLOODS, len(could))
    assert all(backlogs[t].tokens <= least for t in could - told.keys())


@given(SEEDS, st.integers(1, 10_000))
def test_what_a_flood_adds_to_its_queue_is_its_own_wait_alone(seed, more):
    backlogs, vtc, pace, rows, step_tokens = drawn(seed)
    floor = vtc.floor
    vtc.charge("flood", 2 * floor + 1, 1.0)
    backlogs["flood"] = Backlog(10**6, 10**6, 10**9)
    before = expected_waits(backlogs, vtc, pace, rows, step_tokens)
    backlogs["flood"] = Backlog(10**6 + more, 10**6 + more, 10**9 + 500 * more)
    after = expected_waits(backlogs, vtc, pace, rows, step_tokens)
    assert after.turn_s == before.turn_s
    assert after.floods["flood"][1] > before.floods["flood"][1]
    assert after.all_s > before.all_s


@given(SEEDS)
def test_the_more_places_others_have_the_longer_the_wait_for_one(seed):
    """Before any of them has to wait, so that routing spreads them."""
    rng = random.Random(seed)
    rows = rng.randrange(4, 100)
    floods = Backlog(500, 400, 400 * 512)
    waits: list[float] = []
    for taken in range(rows):
        backlogs = {"flood": floods, "calm": Backlog(taken, 0, 0)}
        vtc = counters({"flood": 10.0}, floor=10.0)
        waits.append(expected_waits(backlogs, vtc, paced(), rows, 512).turn_s)
    assert waits == sorted(set(waits))


def test_two_tenants_with_equal_queues_wait_for_both_and_a_short_queue_for_its_like():
    """By turns, 300 tokens beside 10,000 of another's take 600 tokens and the step's others."""
    pace = paced(step_s=0.0, token_s=1.0, end_s=0.0)
    vtc = counters({"long": 50.0, "short": 50.0}, floor=50.0)

    def waits(short: int) -> Waits:
        backlogs = {"long": Backlog(9, 9, 10_000), "short": Backlog(2, 2, short)}
        return expected_waits(backlogs, vtc, pace, 64, 100)

    even = waits(10_000).floods
    assert even["long"][1] == even["short"][1] == 20_000
    assert waits(300).floods["short"][1] == 600 + 100
    assert waits(300).floods["long"][1] == 10_300
    assert waits(300).turn_s == 100


def test_the_told_order_is_the_queues_own():
    """Requests that the formula counts before a new one are those that the queue starts before it,
    where every request has the same price: its prompt's tokens."""
    rng = random.Random()
    for _ in range(30):
        vtc: VirtualTokenCounter = VirtualTokenCounter()
        queue: FairQueue[str] = FairQueue(vtc, slack=0.0)
        count = {"a": rng.randrange(1, 40), "b": rng.randrange(1, 40), "c": rng.randrange(1, 40)}
        backlogs = {t: Backlog(n, n, 10 * n) for t, n in count.items()}
        for t, n in count.items():
            for i in range(n):
                queue.add(f"{t}{i}", t, i)
        told = expected_waits(backlogs, vtc, paced(0.0, 1.0, 0.0), 10**6, 0).floods
        asked = rng.choice(sorted(count))
        queue.add(f"{asked}-new", asked, 10**6)
        started: list[str] = []
        while f"{asked}-new" not in started:
            item = next(iter(queue.candidates()))
            queue.admit(item)
            vtc.charge(item[0], 10.0, 1.0)
            started.append(item)
        assert told[asked][1] == pytest.approx(10 * (len(started) - 1), abs=10 * len(count))
