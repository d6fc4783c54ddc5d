"""What the scheduler makes of fairness: who pays for what, who gives way, what a step holds."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from loraplex.workers import AdapterRef, Engine, GenerationRequest, SamplingParams
from loraplex.workers.errors import DeadlinePassed, WorkerError
from loraplex.workers.fairness import Prices
from loraplex.workers.kv_blocks import KVBlocks
from loraplex.workers.pool.residency import Waiting
from loraplex.workers.scheduler import Scheduler
from loraplex.workers.sequence import Sequence

from .conftest import LocalPacks

BLOCK = 4


@dataclass
class Adapters:
    """A pool of adapters by size, which takes whatever is asked for while it has the room."""

    sizes: dict[str, int] = field(default_factory=dict)  # tenant -> bytes of its adapter
    rank: int = 0
    room: int = 10**12
    resident: dict[str, int] = field(default_factory=dict)  # tenant -> users
    away: set[str] = field(default_factory=set)  # tenants whose adapter isn't on this node
    loads: int = 0

    def want(self, ref: AdapterRef) -> None:
        pass

    def acquire(self, ref: AdapterRef, tokens: int) -> tuple[int, str]:
        t, tier = ref.tenant_id, "gpu"
        if t in self.away:
            raise Waiting(for_room=False)
        if t not in self.resident:
            needed, idle = self.sizes[t], [x for x, n in self.resident.items() if not n]
            while sum(self.sizes[x] for x in self.resident) + needed > self.room:
                if not idle:
                    raise Waiting(for_room=True)
                del self.resident[idle.pop()]
            self.resident[t], tier = 0, "disk"
            self.loads += 1
        self.resident[t] += 1
        return sorted(self.sizes).index(t), tier

    def release(self, slot: int, drop: bool) -> None:
        self.resident[sorted(self.sizes)[slot]] -= 1

    def size(self, slot: int) -> tuple[int, int]:
        return self.sizes[sorted(self.sizes)[slot]], self.rank


@dataclass
class Group:
    """A scheduler whose model answers at once."""

    adapters: Adapters = field(default_factory=Adapters)
    blocks: int = 1000
    batch: int = 64
    running: int = 8
    slack: float = 50.0
    step_bytes: int | None = None
    prices: Prices = field(default_factory=Prices)
    now: float = 0.0
    count: int = 0
    ended: list[Sequence] = field(default_factory=list)
    refused: list[tuple[Sequence, Exception]] = field(default_factory=list)

    def __post_init__(self) -> None:
        residency: Any = self.adapters
        self.kv = KVBlocks(self.blocks, BLOCK)
        self.scheduler = Scheduler(
            self.kv, residency, self.batch, self.running, self.slack, self.step_bytes, self.prices
        )

    def add(
        self, tenant: str, prompt: int = 4, answer: int = 2, adapter: bool = False, **more: Any
    ) -> Sequence:
        rng = random.Random(self.count)
        ids = more.pop("prompt_ids", None) or tuple(rng.randrange(10**6) for _ in range(prompt))
        request = GenerationRequest(
            str(self.count),
            ids,
            SamplingParams(max_tokens=answer),
            tenant,
            AdapterRef(tenant, "0" * 64) if adapter else None,
            **more,
        )
        seq = Sequence(request, self.count, len(ids) + answer)
        if request.timeout_s is not None:
            seq.deadline = self.now + request.timeout_s
        self.count += 1
        self.scheduler.add(seq)
        return seq

    def step(self) -> list[Sequence]:
        """The sequences of the step."""
        may_preempt, before = self.scheduler.may_preempt(), self.scheduler.preemptions
        work, refusals = self.scheduler.schedule(self.now)
        assert may_preempt or self.scheduler.preemptions == before
        self.refused += [(r.seq, r.error) for r in refusals]
        assert sum(w.count for w in work) <= self.batch
        for w in work:
            self.scheduler.launched(w)
            self.scheduler.landed(w)
            if not w.seq.pending:
                w.seq.tokens.append(random.Random(w.seq.length).randrange(10**6))
                if w.seq.length >= w.seq.limit:
                    self.scheduler.remove(w.seq)
                    self.ended.append(w.seq)
        self.kv.check_integrity()
        return [w.seq for w in work]

    def drain(self, most: int = 2000) -> None:
        for _ in range(most):
            if not self.scheduler.running and not len(self.scheduler.waiting):
                assert self.kv.used == 0
                return
            self.step()
        raise AssertionError("it never ended")

    @property
    def total(self) -> float:
        return self.scheduler.vtc.total


def test_a_request_costs_its_prompt_and_twice_its_answer_however_it_is_cut():
    for batch in (3, 7, 64):
        group = Group(batch=batch)
        group.add("a", prompt=20, answer=5)
        group.drain()
        assert group.total == 20 + 2 * 5


def test_rank_and_loads_are_in_the_price_and_loads_are_paid_once():
    prices = Prices(load_byte=0.5)
    group = Group(Adapters({"a": 100}, rank=64), prices=prices)
    group.add("a", prompt=20, answer=5, adapter=True)
    group.drain()
    assert group.total == pytest.approx(30 * 1.5 + 50)
    group.add("a", prompt=20, answer=5, adapter=True)
    group.drain()
    assert group.total == pytest.approx(2 * 30 * 1.5 + 50)


def test_a_cached_prefix_costs_nothing():
    group = Group()
    prompt = tuple(range(1, 22))
    group.add("a", prompt_ids=prompt, answer=1)
    group.drain()
    assert group.total == 21 + 2
    group.add("a", prompt_ids=prompt, answer=1)
    group.drain()
    assert group.total == 21 + 2 + 1 + 2  # 20 of 21 were found


def test_a_continuation_pays_for_what_it_still_generates_only():
    """Its prompt and the first tokens were paid for where they were computed."""
    group = Group(batch=5)
    group.add("a", prompt=20, answer=8, output_ids=(1, 2, 3))
    group.drain()
    assert group.total == 2 * (8 - 3)


def test_what_is_computed_again_after_a_preemption_is_not_charged_again():
    group = Group(blocks=24, running=8, batch=16)
    for i in range(6):
        group.add(f"t{i}", prompt=10, answer=30)
    group.drain()
    assert group.scheduler.preemptions > 0
    assert group.total == 6 * (10 + 2 * 30)
    assert len(group.ended) == 6


def test_who_gives_way_is_the_youngest_of_the_tenant_that_is_furthest_ahead():
    group = Group(blocks=30, running=8, batch=64)
    first = group.add("heavy", prompt=40, answer=40)
    group.step()
    group.step()
    light = group.add("light", prompt=8, answer=60)
    second = group.add("heavy", prompt=40, answer=40)
    preempted: list[Sequence] = []
    while not preempted:
        before = set(group.scheduler.running)
        group.step()
        preempted = [s for s in before if s in set(group.scheduler.waiting)]
    assert preempted == [second]
    assert {first, light} <= set(group.scheduler.running)


def test_random_traffic_in_little_memory_ends_with_every_price_paid_once():
    """Preemption, chunks, cached prefixes of one's own, priorities and deadlines far away."""
    rng = random.Random()
    for _ in range(10):
        group = Group(blocks=rng.choice([20, 40]), batch=rng.choice([5, 16, 64]), running=6)
        due = 0
        for i in range(40):
            prompt, answer = rng.randint(1, 40), rng.randint(1, 30)
            due += prompt + 2 * answer
            priority, timeout_s = rng.choice([0, 0, 5, -5]), rng.choice([None, 1e9])
            group.add(f"t{i % 3}", prompt, answer, priority=priority, timeout_s=timeout_s)
            if rng.random() < 0.3:
                group.step()
        group.drain()
        assert len(group.ended) == 40
        assert group.total == due


def test_a_long_prompt_lets_other_tenants_begin_beside_it():
    """Prompts share steps by what their tenants have got, chunk by chunk."""
    group = Group(batch=16)
    long = group.add("long", prompt=400, answer=1)
    group.step()
    group.step()
    short = group.add("short", prompt=8, answer=1)
    assert short in group.step()
    assert long.computed < 400
    group.drain()


def test_equal_tenants_finish_equal_work_whatever_the_sizes_of_their_requests():
    group = Group(running=8, batch=64, slack=0.0)
    for _ in range(1500):
        waiting = group.scheduler.waiting.by_tenant()
        for tenant, prompt, answer in (("small", 3, 2), ("large", 50, 30)):
            for _ in range(9 - waiting.get(tenant, 0)):
                group.add(tenant, prompt, answer)
        group.step()
    done = {"small": 0, "large": 0}
    for seq in group.ended:
        done[seq.request.tenant_id] += len(seq.request.prompt_ids) + 2 * seq.output_count
    assert done["small"] == pytest.approx(done["large"], rel=0.05)


def test_the_weight_comes_with_the_request():
    group = Group(running=8, slack=0.0)
    for _ in range(1000):
        waiting = group.scheduler.waiting.by_tenant()
        for tenant, weight in (("one", 1.0), ("three", 3.0)):
            for _ in range(9 - waiting.get(tenant, 0)):
                group.add(tenant, 5, 5, weight=weight)
        group.step()
    served = [s.request.tenant_id for s in group.ended]
    assert served.count("three") / served.count("one") == pytest.approx(3, rel=0.1)


def test_a_step_holds_only_so_many_bytes_of_distinct_adapters():
    sizes = {"a": 40, "b": 40, "c": 40, "huge": 500}
    group = Group(Adapters(sizes), step_bytes=100, running=8)
    for _ in range(6):
        for tenant in sizes:
            group.add(tenant, adapter=True, answer=6)
    group.add("base", answer=6)
    seen: set[str] = set()
    while len(group.scheduler.waiting) or group.scheduler.running:
        ran = {s.request.tenant_id for s in group.step()} - {"base"}
        seen |= ran
        assert sum(sizes[t] for t in ran) <= 100 or ran == {"huge"}
    assert seen == set(sizes)
    assert len(group.ended) == 25


def test_a_request_that_isnt_begun_in_its_time_is_refused_and_one_that_is_goes_on():
    group = Group(running=1)
    begun = group.add("a", answer=20, timeout_s=5.0)
    late = group.add("a", timeout_s=5.0)
    never = group.add("a")
    group.step()
    group.now = 4.9
    group.step()
    assert not group.refused
    group.now = 5.0
    group.step()
    assert [seq for seq, _ in group.refused] == [late]
    error = group.refused[0][1]
    assert isinstance(error, DeadlinePassed)
    assert "5 s" in str(error)
    group.drain()
    assert group.ended == [begun, never]


def test_a_preempted_request_is_past_its_deadline():
    group = Group(blocks=12, running=8)
    seqs = [group.add(f"t{i}", prompt=8, answer=30, timeout_s=1.0) for i in range(2)]
    group.step()
    group.now = 100.0
    group.drain()
    assert group.scheduler.preemptions > 0
    assert set(group.ended) == set(seqs)
    assert not group.refused


def test_an_adapter_on_its_way_holds_nobody_up_and_earns_its_tenant_nothing():
    group = Group(Adapters({"late": 1}, away={"late"}), slack=0.0, running=4)
    for _ in range(20):
        group.add("late", adapter=True)
        group.add("base")
    while [s for s in group.scheduler.waiting if s.request.tenant_id == "base"]:
        group.step()
    for _ in range(40):
        group.add("base")
    group.adapters.away.clear()
    ended = len(group.ended)
    while len(group.ended) < ended + 20:
        group.step()
    late = sum(s.request.tenant_id == "late" for s in group.ended[ended:])
    assert 6 <= late <= 14


def test_thrashing_the_pool_is_paid_for():
    """Room for one adapter: who brings its own each time gets less than who needs none."""
    prices = Prices(load_byte=1.0)
    group = Group(Adapters({"x": 50, "y": 50}, room=50), slack=0.0, running=2, prices=prices)
    for _ in range(600):
        waiting = group.scheduler.waiting.by_tenant()
        for tenant in ("x", "y", "base"):
            for _ in range(4 - waiting.get(tenant, 0)):
                group.add(tenant, prompt=10, answer=1, adapter=tenant != "base")
        group.step()
    served = [s.request.tenant_id for s in group.ended]
    assert served.count("base") > 2 * max(served.count("x"), served.count("y"))
    assert min(served.count("x"), served.count("y")) > 10


def test_a_fetch_ends_with_the_last_request_that_waited_for_it_in_time(demo, greedy):
    class FarAway(LocalPacks):
        def ensure(self, tenant_id: str, digest: str, wanted: Any = None) -> tuple[Path, str]:
            while wanted():
                time.sleep(0.001)
            ended.set()
            raise WorkerError("nobody wants it")

    ended, packs = threading.Event(), FarAway()
    engine = Engine(demo.config(), packs)
    ref = AdapterRef("acme", "0" * 64)
    for name, timeout_s in (("soon", 0.01), ("later", 0.2)):
        request = greedy(name, [10, 11], max_tokens=2)
        engine.submit(replace(request, tenant_id="acme", adapter=ref, timeout_s=timeout_s))
    codes: dict[str, str | None] = {}
    while engine.has_work():
        codes |= {out.request_id: out.error_code for out in engine.step()}
        assert not ended.is_set() or "later" in codes
    assert codes == dict.fromkeys(("soon", "later"), "deadline_exceeded")
    assert ended.wait(5)
    engine.close()


def test_the_engines_report_says_who_is_ahead_and_who_waits(make_engine, greedy):
    engine = make_engine(max_running=2)
    for i in range(3):
        engine.submit(replace(greedy(f"a{i}", [10, 11], max_tokens=9), tenant_id="a"))
    for _ in range(4):
        engine.step()
    late = replace(greedy("late", [10], max_tokens=9), tenant_id="b", timeout_s=1e-6)
    engine.submit(late)
    outputs = [out for _ in range(2) for out in engine.step()]
    refused = [o for o in outputs if o.request_id == "late"]
    assert [o.error_code for o in refused] == ["deadline_exceeded"]
    report = engine.report()
    assert report.tenant_leads["a"] > 0
    assert report.tenants_waiting["a"] == 1
    assert type(report).from_wire(report.to_wire()) == report
