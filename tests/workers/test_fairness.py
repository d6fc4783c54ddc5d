"""The promises of the fair queue, held against adversaries: who may get how far ahead, that nobody
starves, that nothing idles, and what of it weights, prices, priorities and rooms change."""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.workers.fair_queue import FairQueue
from loraplex.workers.fairness import Prices, VirtualTokenCounter
from loraplex.workers.places import Places


@dataclass(eq=False)
class Job:
    """A request: what its start costs, then so many steps at so much."""

    tenant: str
    weight: float = 1.0
    start: float = 1.0
    steps: int = 1
    step_price: float = 2.0
    adapter: str | None = None
    ready_at: int = 0  # round in which its adapter is on this node
    left: int = 0
    priority: int = 0

    @property
    def most(self) -> float:
        return (self.start + self.steps * self.step_price) / self.weight


@dataclass
class Server:
    """A stand-in for the scheduler: `places` requests run at once, with at most `rooms` distinct
    adapters. It tells where work was left undone although a place was free."""

    places: int
    slack: float
    rooms: int = 10**9
    credit: float = 0.0
    reserve: bool = False  # places as `Places` gives them out
    round: int = 0
    running: list[Job] = field(default_factory=list)
    service: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # over weight
    waited: dict[Job, float] = field(default_factory=dict)  # job -> total when it was blocked
    started: list[Job] = field(default_factory=list)
    work_while_blocked: float = 0.0
    idle_with_work: int = 0
    _arrivals: int = 0

    def __post_init__(self) -> None:
        self.vtc = VirtualTokenCounter(self.credit)
        self.queue: FairQueue[Job] = FairQueue(self.vtc, self.slack)
        self.given = Places(self.places)

    def add(self, job: Job) -> None:
        self._arrivals += 1
        self.queue.add(job, job.tenant, self._arrivals, job.priority)

    def _charge(self, job: Job, price: float) -> None:
        self.vtc.charge(job.tenant, price, job.weight)
        self.service[job.tenant] += price / job.weight

    def step(self) -> None:
        self.round += 1
        for job in self.running:
            self._charge(job, job.step_price)
            job.left -= 1
            if not job.left:
                self.given.give(job.tenant)
        self.running = [j for j in self.running if j.left > 0]
        for job in self.queue.candidates():
            if len(self.running) >= self.places:
                break
            behind = self.vtc.behind(job.tenant)
            if self.reserve and not self.given.open_to(job.tenant, behind):
                self.queue.pass_over(job)
                continue
            if job.ready_at > self.round:
                self.queue.park(job)
                continue
            adapters = {j.adapter for j in self.running} - {None}
            if job.adapter not in (None, *adapters) and len(adapters) >= self.rooms:
                self.queue.block(job)
                self.waited.setdefault(job, self.vtc.total)
                continue
            self.queue.ready(job)
            self.queue.admit(job)
            self.given.take(job.tenant)
            self._charge(job, job.start)
            if job in self.waited:
                waited = self.vtc.total - self.waited.pop(job)
                self.work_while_blocked = max(self.work_while_blocked, waited)
            job.left = job.steps
            self.started.append(job)
            self.running.append(job)
        could = any(j.ready_at <= self.round and j not in self.waited for j in self.queue)
        self.idle_with_work += could and len(self.running) < self.places and not self.waited

    @property
    def active(self) -> set[str]:
        return {j.tenant for j in self.queue if j.ready_at <= self.round}


@st.composite
def traffic(draw: st.DrawFn) -> tuple[Server, list[list[Job]]]:
    """Jobs of each round, by tenants of all sorts: floods, bursts, absences, rare large jobs."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    tenants = [f"t{i}" for i in range(rng.randrange(2, 7))]
    weight = {t: rng.choice([0.5, 1.0, 1.0, 3.0]) for t in tenants}
    size = {t: rng.choice([1, 1, 10, 200]) for t in tenants}
    rate = {t: rng.choice([0.05, 0.5, 2.0, 5.0]) for t in tenants}
    away = {t: rng.sample(range(200), 2) for t in tenants}
    rounds: list[list[Job]] = []
    for n in range(200):
        jobs: list[Job] = []
        for t in tenants:
            if min(away[t]) <= n < max(away[t]):
                continue
            count = int(rate[t]) if rate[t] >= 1 else int(rng.random() < rate[t])
            for _ in range(count):
                adapter = rng.choice([None, f"{t}/a", f"{t}/b"])
                jobs.append(
                    Job(
                        t,
                        weight[t],
                        start=rng.randint(1, size[t]) + rng.choice([0, 0, 30]),
                        steps=rng.randint(1, 12),
                        step_price=rng.choice([2.0, 2.5]),
                        adapter=adapter,
                        ready_at=n + rng.choice([0, 0, 0, 5, 40]) if adapter else 0,
                        priority=rng.choice([0, 0, -1, 7]),
                    )
                )
        rng.shuffle(jobs)
        rounds.append(jobs)
    server = Server(
        places=rng.choice([1, 3, 8]),
        slack=rng.choice([0.0, 20.0, 200.0]),
        rooms=rng.choice([1, 2, 3, 10**9]),
        credit=rng.choice([0.0, 100.0]),
    )
    return server, rounds


@settings(max_examples=60, deadline=None)
@given(traffic(), st.booleans())
def test_tenants_that_wait_all_the_time_get_equal_shares_within_the_stated_bound(case, reserve):
    server, rounds = case
    server.reserve = reserve
    most = max((j.most for jobs in rounds for j in jobs), default=0.0)
    bound = 2 * (server.places * most + server.slack + server.credit)
    # Of each pair that is active: by how much the one was ahead of the other, least and most.
    spans: dict[tuple[str, str], tuple[float, float]] = {}
    before: set[str] = set()
    for jobs in [*rounds, *([[]] * 300)]:
        for job in jobs:
            server.add(job)
        server.step()
        active = server.active & before
        before = server.active
        spans = {pair: span for pair, span in spans.items() if set(pair) <= active}
        for f in active:
            for g in active - {f}:
                ahead = server.service[f] - server.service[g]
                low, high = spans.get((f, g), (ahead, ahead))
                spans[f, g] = low, high = min(low, ahead), max(high, ahead)
                assert high - low <= bound + 1e-6


@settings(max_examples=40, deadline=None)
@given(traffic())
def test_everything_starts_in_the_end_and_nothing_idles_while_something_could_start(case):
    server, rounds = case
    for jobs in rounds:
        for job in jobs:
            server.add(job)
        server.step()
    for _ in range(40 * sum(len(jobs) for jobs in rounds) + 100):
        if not len(server.queue):
            break
        server.step()
    assert not len(server.queue)
    assert server.idle_with_work == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([10.0, 100.0]), st.integers(1, 200))
def test_a_cold_tenant_gets_room_however_many_stream_to_a_resident_adapter(seed, slack, streams):
    """Its wait, in work done, is the slack, what was running by then, and no more. Every stream is
    a tenant of its own, so that none gets far ahead of the cold one by itself."""
    rng = random.Random(seed)
    server = Server(places=4, slack=slack, rooms=1)
    cold = Job("cold", adapter="cold/x")
    for n in range(400):
        server.add(Job(f"hot{rng.randrange(streams)}", steps=rng.randint(1, 6), adapter="hot/a"))
        if n == 10:
            server.add(cold)
        server.step()
    assert cold in server.started
    most = Job("", steps=6).most
    assert server.work_while_blocked <= slack + 4 * most + most


def test_who_waited_for_room_keeps_its_turn_while_its_adapter_loads():
    """Or others would take the room again when the load has ended, over and over."""
    vtc = VirtualTokenCounter()
    queue: FairQueue[str] = FairQueue(vtc, slack=10.0)
    for i in range(20):
        queue.add(f"hot{i}", "hot", i)
    queue.add("cold", "cold", 20)
    vtc.charge("cold", 5.0, 1.0)  # so that by counters the others go first

    def tried(loading: bool = False) -> list[str]:
        """One of "hot" starts if it is asked."""
        items, started = [], False
        for item in queue.candidates():
            items.append(item.rstrip("0123456789"))
            if item == "cold":
                (queue.park if loading else queue.block)(item)
            elif started:
                queue.pass_over(item)
            else:
                started = True
                queue.ready(item)
                queue.admit(item)
                vtc.charge("hot", 4.0, weight=100.0)
        return items

    for _ in range(4):
        assert tried() == ["hot", "hot", "cold"]
    assert tried() == ["cold"]  # work worth the slack was done since it waits: nobody passes it
    assert tried(loading=True) == ["cold", "hot", "hot"]
    assert tried() == ["cold"]


def shares(server: Server, make: dict[str, Callable[[], Job]], rounds: int) -> dict[str, float]:
    """Work done for each tenant while all of them have requests waiting all the time."""
    for _ in range(rounds):
        for tenant, new in make.items():
            while sum(j.tenant == tenant for j in server.queue) <= server.places:
                server.add(new())
        server.step()
    return dict(server.service)


def test_weights_share_the_work():
    server = Server(places=4, slack=0.0)
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    make = {t: (lambda t=t: Job(t, weights[t], steps=3)) for t in weights}
    got = shares(server, make, 2000)
    work = {t: got[t] * weights[t] for t in weights}
    for t, weight in weights.items():
        assert work[t] / sum(work.values()) == pytest.approx(weight / 8, rel=0.02)


def test_who_loads_an_adapter_with_each_request_gets_fewer_of_them():
    """Equal prices in all, not equal numbers of requests: the pool isn't thrashed for free."""
    prices = Prices(load_byte=1e-6)
    dear = prices.tokens(10, 0, rank=0) + prices.load(90_000_000)
    server = Server(places=2, slack=0.0)
    make = {
        "loads": lambda: Job("loads", start=dear, steps=1, step_price=0.0),
        "stays": lambda: Job("stays", start=10.0, steps=1, step_price=0.0),
    }
    shares(server, make, 3000)
    started = [j.tenant for j in server.started]
    assert started.count("stays") / started.count("loads") == pytest.approx(10, rel=0.05)


def test_rank_makes_each_token_dearer():
    prices = Prices()
    assert prices.tokens(100, 10, 0) == 120
    assert prices.tokens(100, 10, 64) == pytest.approx(180)


def test_time_without_requests_earns_nothing():
    """A tenant that was away shares from its return on; it doesn't catch up."""
    server = Server(places=1, slack=0.0)
    for _ in range(100):
        server.add(Job("always"))
        server.step()
    make = {"always": lambda: Job("always"), "back": lambda: Job("back")}
    before = server.service["always"]
    shares(server, make, 200)
    assert server.service["back"] == pytest.approx(server.service["always"] - before, abs=10)


def test_a_credit_allows_a_burst_of_its_size_and_no_more():
    server = Server(places=1, slack=0.0, credit=50.0)
    server.add(Job("back"))
    for _ in range(200):
        server.add(Job("always"))
    for _ in range(100):
        server.step()
    assert server.vtc.counter("always") - server.vtc.counter("back") > 50
    for _ in range(100):
        server.add(Job("back"))
    begun = len(server.started)
    for _ in range(40):
        server.step()
    first = [j.tenant for j in server.started[begun:]]
    alone = first.index("always")  # how many of "back" came before
    assert 50 / 3 - 2 <= alone <= 50 / 3 + 2
    rest = first[alone:]
    assert abs(rest.count("back") - rest.count("always")) <= 2


def test_a_flood_leaves_places_to_start_from_at_once():
    """Whoever else comes now and then starts in the round of its arrival; alone, the flood has
    every place."""
    server = Server(places=20, slack=1000.0, reserve=True)
    rng, flooded = random.Random(), []
    for n in range(300):
        while sum(j.tenant == "flood" for j in server.queue) < 30:
            server.add(Job("flood", steps=10))
        if n < 50:
            server.step()
            assert len(server.running) == 20
            continue
        visitor = Job(f"v{rng.randrange(3)}", steps=3) if rng.random() < 0.5 else None
        if visitor is not None:
            server.add(visitor)
        server.step()
        if n > 70:
            assert visitor is None or visitor in server.started
            flooded.append(sum(j.tenant == "flood" for j in server.running))
    assert statistics.mean(flooded) >= 15


def test_who_is_below_its_share_may_have_the_last_places_beside_a_flood():
    """Also where it has as many as the flood already; once it has used its share, it waits."""
    places = Places(20)
    for tenant, count in (("flood", 9), ("busy", 9)):
        for _ in range(count):
            places.take(tenant)
    vtc = VirtualTokenCounter(credit=100.0)
    vtc.join("flood")
    vtc.charge("flood", 500.0, 1.0)
    vtc.join("busy")
    vtc.leave("busy")
    vtc.admit("flood")  # the lowest that waits: whoever has less is below its share
    assert vtc.behind("busy")
    assert not vtc.behind("flood")
    assert not any(places.open_to(t) for t in ("flood", "busy"))
    assert places.open_to("busy", vtc.behind("busy"))
    vtc.charge("busy", 600.0, 1.0)
    assert not places.open_to("busy", vtc.behind("busy"))
    for _ in range(2):
        places.take("busy")
    assert not places.open_to("other", behind=True)  # there is none


def test_waiting_for_a_fetch_earns_nothing_either():
    server = Server(places=1, slack=0.0)
    server.round = 1
    for _ in range(60):  # all that "late" wants is fetched by round 100
        server.add(Job("late", adapter="late/a", ready_at=100))
    while server.round < 100:
        server.add(Job("busy"))
        server.add(Job("busy"))
        server.step()
    before = dict(server.service)
    for _ in range(50):
        server.add(Job("busy"))
        server.step()
    late, busy = (server.service[t] - before.get(t, 0.0) for t in ("late", "busy"))
    assert late == pytest.approx(busy, abs=10)


def test_within_a_tenant_priority_comes_first_then_deadline_then_arrival():
    queue: FairQueue[str] = FairQueue(VirtualTokenCounter(), 0.0)
    queue.add("plain", "t", 1)
    queue.add("late", "t", 2, deadline=9.0)
    queue.add("soon", "t", 3, deadline=5.0)
    queue.add("plain2", "t", 4)
    queue.add("urgent", "t", 5, priority=-1)
    queue.add("idle", "t", 0, priority=3, deadline=1.0)
    assert list(queue.candidates()) == ["urgent", "soon", "late", "plain", "plain2", "idle"]


def test_priority_takes_nothing_from_other_tenants():
    server = Server(places=1, slack=0.0)
    make = {"loud": lambda: Job("loud", priority=-100), "meek": lambda: Job("meek", priority=100)}
    got = shares(server, make, 500)
    assert got["loud"] == pytest.approx(got["meek"], abs=10)


def test_tenants_that_are_gone_are_forgotten_and_reports_are_bounded():
    server = Server(places=2, slack=0.0)
    for i in range(5000):
        server.add(Job(f"t{i}"))
        server.step()
    assert len(server.vtc._counters) < 600
    assert len(server.vtc._admitted) < 600
    leads = server.vtc.leads(["named"], 7)
    assert len(leads) == 7
    assert next(iter(leads)) == "named"
