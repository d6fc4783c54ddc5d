"""Token buckets never grant more than their rate, and leases never more than the buckets."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.cluster.leases import AWAY_S, KEEP_S, LocalLeases
from loraplex.cluster.limiter import Lease, Limiter, Rates, TokenBucket

steps = st.lists(
    st.tuples(st.floats(0, 90), st.integers(0, 70)), min_size=1, max_size=60
)  # (seconds that pass, amount asked)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.integers(1, 60), steps)
def test_no_window_holds_more_than_a_minutes_budget_and_its_refill(per_minute, asked):
    bucket = TokenBucket(per_minute, 0.0)
    now, taken = 0.0, []
    for seconds, amount in asked:
        now += seconds
        if bucket.take(amount, now):
            taken.append((now, amount))
    for i, (begin, _) in enumerate(taken):
        for j in range(i, len(taken)):
            total = sum(amount for _, amount in taken[i : j + 1])
            minutes = (taken[j][0] - begin) / 60
            assert total <= per_minute * (1 + minutes) + 1e-6


@given(st.integers(1, 60), steps)
def test_after_the_stated_wait_the_amount_is_there(per_minute, asked):
    bucket = TokenBucket(per_minute, 0.0)
    now = 0.0
    for seconds, amount in asked:
        now += seconds
        wait_s = bucket.wait(amount, now)
        if amount > per_minute:
            assert math.isinf(wait_s)
        elif wait_s:
            assert not bucket.take(amount, now)
            now += wait_s + 1e-6
            assert bucket.take(amount, now)
        else:
            assert bucket.take(amount, now)


def test_a_debt_is_paid_before_anything_is_granted():
    bucket = TokenBucket(60, 0.0)
    bucket.give(-120, 0.0)  # an answer longer than reserved
    assert not bucket.take(1, 60.0)
    assert bucket.take(1, 61.0 + 1e-6)


@given(st.integers(1, 100), st.integers(1, 100), st.integers(0, 100))
def test_another_rate_grants_nothing_by_itself(old, new, used):
    bucket = TokenBucket(old, 0.0)
    bucket.take(min(used, old), 0.0)
    before = bucket.level(0.0)
    bucket.set_rate(new, 0.0)
    assert bucket.level(0.0) <= min(before, new)


class Remote:
    """The limiter actor, in process."""

    def __init__(self, clock: Clock) -> None:
        self.limiter = Limiter(clock)
        self.calls = 0
        self.down = False

    async def lease(self, *args) -> Lease:
        await asyncio.sleep(0)
        if self.down:
            raise ConnectionError("the actor is gone")
        self.calls += 1
        return self.limiter.lease(*args)

    async def give_back(self, *args) -> None:
        if self.down:
            raise ConnectionError("the actor is gone")
        self.limiter.give_back(*args)


@given(
    st.integers(1, 3),
    st.lists(
        st.tuples(st.floats(0, 20), st.integers(0, 2), st.integers(1, 400), st.integers(0, 500)),
        max_size=40,
    ),
)
def test_several_gateways_together_stay_within_the_rates(gateways, asked):
    async def play() -> None:
        clock = Clock()
        remote = Remote(clock)
        leases = [LocalLeases(remote, clock) for _ in range(gateways)]
        rates = Rates(requests_per_minute=20, tokens_per_minute=1000)
        begin = clock.now
        requests = tokens = 0
        for seconds, who, reserve, used in asked:
            clock.now += seconds
            mine = leases[who % gateways]
            if seconds > KEEP_S:
                await mine.sweep()
            grant = await mine.acquire("t", rates, 1, reserve)
            if grant.wait_s == 0:
                requests += 1
                used = min(used, reserve)
                tokens += used
                mine.settle("t", reserve - used)
            minutes = (clock.now - begin) / 60
            assert requests <= 20 * (1 + minutes) + 1e-6
            assert tokens <= 1000 * (1 + minutes) + 1e-6

    asyncio.run(play())


async def test_most_requests_ask_nobody():
    clock = Clock()
    remote = Remote(clock)
    leases = LocalLeases(remote, clock)
    rates = Rates(requests_per_minute=6000, tokens_per_minute=6_000_000)
    for _ in range(1000):
        assert (await leases.acquire("t", rates, 1, 100)).wait_s == 0
    assert remote.calls <= 10


async def test_unlimited_tenants_never_reach_the_limiter():
    clock = Clock()
    remote = Remote(clock)
    leases = LocalLeases(remote, clock)
    assert (await leases.acquire("t", Rates(), 1, 10**9)).wait_s == 0
    assert remote.calls == 0


async def test_a_request_beyond_a_minutes_budget_can_never_be_granted():
    leases = LocalLeases(Remote(Clock()), Clock())
    grant = await leases.acquire("t", Rates(tokens_per_minute=100), 1, 101)
    assert math.isinf(grant.wait_s)


async def test_concurrent_requests_take_each_unit_once():
    clock = Clock()
    leases = LocalLeases(Remote(clock), clock)
    rates = Rates(requests_per_minute=50)
    grants = await asyncio.gather(*(leases.acquire("t", rates, 1, 5) for _ in range(80)))
    assert sum(g.wait_s == 0 for g in grants) == 50
    refused = [g for g in grants if g.wait_s]
    assert all(g.wait_s == pytest.approx(60 / 50) for g in refused)


async def test_unused_budget_goes_back_for_other_gateways():
    clock = Clock()
    remote = Remote(clock)
    one, other = LocalLeases(remote, clock), LocalLeases(remote, clock)
    rates = Rates(tokens_per_minute=1000)
    assert (await one.acquire("t", rates, 1, 1000)).wait_s == 0
    one.settle("t", 1000)  # nothing was used after all
    assert (await other.acquire("t", rates, 1, 900)).wait_s > 0
    clock.now += KEEP_S
    await one.sweep()
    assert (await other.acquire("t", rates, 1, 900)).wait_s == 0


async def test_use_beyond_the_reservation_is_paid_back():
    clock = Clock()
    leases = LocalLeases(Remote(clock), clock)
    rates = Rates(tokens_per_minute=600)
    assert (await leases.acquire("t", rates, 1, 100)).wait_s == 0
    leases.settle("t", -1100)
    grant = await leases.acquire("t", rates, 1, 100)
    assert 60 <= grant.wait_s <= 120
    clock.now += grant.wait_s + 0.01
    assert (await leases.acquire("t", rates, 1, 100)).wait_s == 0


async def test_limits_hold_in_each_gateway_while_the_limiter_is_away():
    clock = Clock()
    remote = Remote(clock)
    remote.down = True
    leases = LocalLeases(remote, clock)
    rates = Rates(requests_per_minute=10)
    grants = [await leases.acquire("t", rates, 1, 1) for _ in range(15)]
    assert sum(g.wait_s == 0 for g in grants) == 10


async def test_a_limiter_that_hangs_is_waited_for_once_in_a_while():
    clock = Clock()
    remote = Remote(clock)
    asked = 0

    async def hang(*args) -> Lease:
        nonlocal asked
        asked += 1
        clock.now += 1.0  # the call's time is over
        raise TimeoutError

    remote.lease = hang  # type: ignore[method-assign]
    leases = LocalLeases(remote, clock)
    rates = Rates(requests_per_minute=60)
    began = clock.now
    grants = await asyncio.gather(*(leases.acquire("t", rates, 1, 1) for _ in range(30)))
    assert all(grant.wait_s == 0 for grant in grants)
    assert (asked, clock.now - began) == (1, 1.0)
    del remote.lease
    clock.now += AWAY_S
    for _ in range(5):
        await leases.acquire("t", rates, 1, 1)
    assert remote.calls > 0
