"""Requests reach groups over real sockets and processes, and outlive the death of a group."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from loraplex.cluster.connection import GroupConnection, GroupLost
from loraplex.cluster.control.table import GroupEntry, RoutingTable
from loraplex.cluster.dispatch import Dispatcher, DispatchLimits
from loraplex.workers import (
    AdapterRef,
    FrontConfig,
    GenerationRequest,
    GroupFront,
    SamplingParams,
    TokenOutput,
)

from tests.workers import fake_group as fake

SECRET = b"cluster secret"
QUICK = DispatchLimits(patience_s=1.0, continuation_patience_s=1.0, poll_s=0.05)


def choose(table, ask, loads, exclude):
    """The first group of the table that isn't excluded."""
    return next((e for e in table.groups if not e.draining and e.group not in exclude), None)


class Controller:
    """Hands out whatever table a test sets."""

    def __init__(self, *groups: GroupEntry):
        self.table = RoutingTable(1, 1, tuple(groups))
        self.down = False
        self.calls = 0

    async def __call__(self, since):
        self.calls += 1
        if self.down:
            raise ConnectionError("the controller is away")
        return self.table.to_wire() if since != (self.table.epoch, self.table.version) else None

    def publish(self, *groups: GroupEntry, epoch: int = 1) -> None:
        self.table = RoutingTable(epoch, self.table.version + 1, tuple(groups))


class Processes:
    """Groups in processes of their own."""

    def __init__(self):
        self._started = []
        self.ranks: dict[str, int] = {}  # process ids

    def start(self, name: str, step_s: float = 0.0, secret: bytes = SECRET):
        process = fake.start_group(name, secret, step_s)
        self._started.append(process)
        assert process.stdout is not None
        port, self.ranks[name] = map(int, process.stdout.readline().split())
        return process, GroupEntry("d", name, "127.0.0.1", port)

    def stop(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()


@pytest.fixture
def processes():
    started = Processes()
    yield started
    started.stop()


@contextlib.asynccontextmanager
async def dispatcher(controller, limits=QUICK, choose=choose, wait=True):
    events: list[tuple[str, str]] = []
    made = Dispatcher(controller, SECRET, choose, limits, lambda e, g: events.append((e, g)))
    made.events = events  # type: ignore[attr-defined]
    await made.start()
    try:
        if wait:
            await until(lambda: all(c.connected for c in made._connections.values()))
        yield made
    finally:
        await made.close()


async def until(condition, timeout_s=10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def request(name: str, prompt=(1, 2), max_tokens=50, seed=0, adapter=None) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=max_tokens, seed=seed, prompt_logprobs=None)
    return GenerationRequest(name, tuple(prompt), sampling, "tenant", adapter)


async def collect(made: Dispatcher, req: GenerationRequest):
    tokens, last = [], None
    async for output in made.generate(req):
        assert last is None, "an output after the final one"
        tokens += output.token_ids
        if output.finish_reason is not None:
            last = output
    assert last is not None
    return tokens, last


async def test_many_streams_over_two_groups_are_what_they_should_be(processes):
    entries = [processes.start(name)[1] for name in ("a", "b")]

    def spread(table, ask, loads, exclude):
        usable = [e for e in table.groups if e.group not in exclude]
        return min(usable, key=lambda e: loads[e.group].requests) if usable else None

    rng = random.Random()
    async with dispatcher(Controller(*entries), choose=spread) as made:
        requests = [
            request(f"r{i}", [rng.randrange(4096) for _ in range(20)], rng.randrange(1, 400), i)
            for i in range(64)
        ]
        results = await asyncio.gather(*(collect(made, r) for r in requests))
        for req, (tokens, last) in zip(requests, results, strict=True):
            count = req.sampling.max_tokens
            assert tokens == fake.expected_tokens(req.prompt_ids, count, req.sampling.seed)
            assert last.finish_reason == "length"
        assert not made.events


async def test_the_choice_sees_the_adapter_the_prompt_and_the_load(processes):
    _, entry = processes.start("a", step_s=0.01)
    seen = []

    def spy(table, ask, loads, exclude):
        seen.append((ask.adapter_key, ask.prompt_hash, dict(loads)))
        return choose(table, ask, loads, exclude)

    async with dispatcher(Controller(entry), choose=spy) as made:
        adapter = AdapterRef("tenant", "ab" * 32)
        streams = [made.generate(request(f"r{i}", adapter=adapter)) for i in range(3)]
        for stream in streams:
            await anext(stream)
        await anext(made.generate(request("other", (9, 9))))
        assert [s[0] for s in seen] == [adapter.key] * 3 + [None]
        assert len({s[1] for s in seen[:3]}) == 1
        assert seen[3][1] != seen[0][1]
        assert [s[2]["a"].requests for s in seen] == [0, 1, 2, 3]


async def test_the_choice_sees_who_asks_and_who_floods_a_group(processes):
    _, entry = processes.start("a", step_s=0.01)
    asked: list[str] = []
    floods: list[dict] = []

    def spy(table, ask, loads, exclude):
        asked.append(ask.tenant)
        floods.append(dict(loads["a"].floods))
        return choose(table, ask, loads, exclude)

    async with dispatcher(Controller(entry), choose=spy) as made:
        opened = [
            made.generate(replace(request(f"r{i}", max_tokens=100_000), tenant_id="flood"))
            for i in range(fake.FLOOD + 2)
        ]
        for stream in opened:
            await anext(stream)
        async with asyncio.timeout(10):
            while not floods or floods[-1].get("flood", (0,))[0] != len(opened):
                one = made.generate(request(f"n{len(asked)}", max_tokens=1))
                await anext(one)
                await one.aclose()
                await asyncio.sleep(0.05)
        assert asked[0] == "flood"
        assert asked[-1] == request("x").tenant_id
        for stream in opened:
            await stream.aclose()


async def test_closing_and_cancelling_free_the_group():
    front = GroupFront(FrontConfig("a", SECRET))
    await front.start()
    rank = fake.start_rank(front.rank_link, step_s=0.005)
    await front.wait_ready(10)
    try:
        entry = GroupEntry("d", "a", "127.0.0.1", front.port)
        async with dispatcher(Controller(entry)) as made:
            closed = made.generate(request("r0", max_tokens=100_000))
            cancelled = asyncio.create_task(collect(made, request("r1", max_tokens=100_000)))
            await anext(closed)
            await until(lambda: front.report.running == 2)
            await closed.aclose()
            await until(lambda: front.report.running == 1)
            cancelled.cancel()
            await until(lambda: front.report.running == 0)
            assert made._connections["a"].streams == 0
    finally:
        await front.close()
        rank.wait()


async def test_a_slow_consumer_holds_nobody_up_and_loses_nothing(processes):
    _, entry = processes.start("a")
    async with dispatcher(Controller(entry)) as made:
        slow = made.generate(request("slow", (4,), max_tokens=2000))
        first = await anext(slow)
        fast = await collect(made, request("fast", (5,), max_tokens=2000))
        assert fast[0] == fake.expected_tokens((5,), 2000)
        stream = next(iter(made._connections["a"]._link.streams.values()))  # type: ignore[union-attr]
        assert sum(len(o["tok"]) for o in stream._arrived) <= 128
        rest = [t async for o in slow for t in o.token_ids]
        assert first.token_ids + rest == fake.expected_tokens((4,), 2000)


@pytest.mark.parametrize("kill_after", [0, 1, 60])
async def test_a_killed_group_is_continued_elsewhere_without_a_seam(processes, kill_after):
    first, one = processes.start("a", step_s=0.005)
    _, two = processes.start("b", step_s=0.001)
    async with dispatcher(Controller(one, two)) as made:
        requests = [request(f"r{i}", (i, 7), 100, seed=i) for i in range(8)]
        got: dict[str, list] = {r.request_id: [] for r in requests}

        async def run(req):
            async for output in made.generate(req):
                got[req.request_id].append(output)

        tasks = [asyncio.create_task(run(r)) for r in requests]
        if kill_after:
            await until(lambda: all(len(o) >= kill_after for o in got.values()))
        else:
            await until(lambda: made._connections["a"].streams == 8)
        first.kill()
        await asyncio.gather(*tasks)
        for req in requests:
            outputs = got[req.request_id]
            tokens = [t for o in outputs for t in o.token_ids]
            expected = fake.expected_tokens(req.prompt_ids, 100, req.sampling.seed)
            assert tokens == expected
            assert [o.finish_reason for o in outputs if o.finish_reason] == ["length"]
            # What the second group says about the start isn't repeated.
            assert [i for i, o in enumerate(outputs) if o.tier] == [0]
            assert sum(o.cached_tokens for o in outputs) == 3
        assert made.events == [("continuation", "a")] * 8


async def test_a_killed_rank_behind_a_living_front_is_the_same(processes):
    front, one = processes.start("a", step_s=0.005)
    _, two = processes.start("b")
    async with dispatcher(Controller(one, two)) as made:
        task = asyncio.create_task(collect(made, request("r", max_tokens=200)))
        await until(lambda: made._connections["a"].streams == 1)
        await asyncio.sleep(0.1)
        os.kill(processes.ranks["a"], signal.SIGKILL)
        assert (await task)[0] == fake.expected_tokens((1, 2), 200)
        assert made.events == [("continuation", "a")]
        assert front.poll() is None


async def test_failures_are_carried_on_only_so_often(processes):
    entries = [processes.start(name)[1] for name in "abcde"]
    async with dispatcher(Controller(*entries)) as made:
        _, last = await collect(made, request("dies", (fake.DIE,)))
        assert last.error_code == "group_failed"
        assert [g for _, g in made.events] == ["a", "b", "c"]
        assert (await collect(made, request("good")))[0] == fake.expected_tokens((1, 2), 50)


async def test_a_request_that_breaks_engines_is_carried_on_once_only(processes):
    entries = [processes.start(name)[1] for name in ("a", "b", "c")]
    async with dispatcher(Controller(*entries)) as made:
        tokens, last = await collect(made, request("bad", (fake.RAISE,)))
        assert not tokens
        assert last.error_code == "engine_failed"
        assert made.events == [("continuation", "a")]
        assert (await collect(made, request("good")))[0] == fake.expected_tokens((1, 2), 50)


async def test_a_full_or_draining_group_is_passed_over():
    fronts, ranks, entries = [], [], []
    for name in ("a", "b"):
        front = GroupFront(FrontConfig(name, SECRET, max_open=1))
        await front.start()
        ranks.append(fake.start_rank(front.rank_link, step_s=0.005))
        await front.wait_ready(10)
        fronts.append(front)
        entries.append(GroupEntry("d", name, "127.0.0.1", front.port))
    try:
        async with dispatcher(Controller(*entries)) as made:
            first = made.generate(request("r0", max_tokens=100_000))
            second = made.generate(request("r1", max_tokens=100_000))
            await anext(first)
            await anext(second)
            assert (fronts[0].open, fronts[1].open) == (1, 1)
            _, last = await collect(made, request("r2"))
            assert last.error_code == "overloaded"
            await second.aclose()
            draining = asyncio.create_task(fronts[0].drain(5))
            await until(lambda: made._connections["a"].draining)
            await until(lambda: fronts[1].open == 0)
            assert (await collect(made, request("r3")))[0] == fake.expected_tokens((1, 2), 50)
            assert made.ready()
            await first.aclose()
            assert await draining
    finally:
        for front, rank in zip(fronts, ranks, strict=True):
            await front.close()
            rank.wait()


async def test_without_groups_the_answer_is_no_group():
    async with dispatcher(Controller()) as made:
        assert not made.ready()
        _, last = await collect(made, request("r"))
        assert last.error_code == "no_group"
        assert made.events == [("no_group", "")]


async def test_a_request_waits_for_a_group_no_longer_than_it_may():
    limits = DispatchLimits(patience_s=30.0, poll_s=0.05)
    async with dispatcher(Controller(), limits) as made:
        _, last = await collect(made, replace(request("r"), timeout_s=0.2))
        assert last.error_code == "deadline_exceeded"
        assert "0.2 s" in (last.error or "")


async def test_the_time_to_begin_runs_on_between_groups_and_ends_with_the_first_token(processes):
    sent: list[GenerationRequest] = []

    class Watching(GroupConnection):
        def open(self, request: GenerationRequest):
            sent.append(request)
            return super().open(request)

    first, one = processes.start("a", step_s=0.02)
    _, two = processes.start("b")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraplex.cluster.dispatch.GroupConnection", Watching)
        async with dispatcher(Controller(one, two)) as made:
            outputs = made.generate(replace(request("r"), timeout_s=60.0))
            tokens = (await anext(outputs)).token_ids
            first.kill()
            tokens += [t async for output in outputs for t in output.token_ids]
            assert tokens == fake.expected_tokens((1, 2), 50)
    assert [r.timeout_s is None for r in sent] == [False, True]
    assert 59.0 < (sent[0].timeout_s or 0) <= 60.0


async def test_a_request_waits_for_a_group_that_comes_up(processes):
    controller = Controller()
    limits = DispatchLimits(patience_s=10.0, poll_s=0.05)
    async with dispatcher(controller, limits) as made:
        waiting = asyncio.create_task(collect(made, request("r")))
        await asyncio.sleep(0.2)
        controller.publish(processes.start("a")[1])
        tokens, _ = await waiting
        assert tokens == fake.expected_tokens((1, 2), 50)


async def test_the_last_table_serves_on_without_a_controller(processes):
    _, entry = processes.start("a")
    controller = Controller(entry)
    async with dispatcher(controller) as made:
        controller.down = True
        calls = controller.calls
        await until(lambda: controller.calls > calls + 2)
        assert (await collect(made, request("r0")))[0] == fake.expected_tokens((1, 2), 50)
        # A new controller that knows no groups yet doesn't take ours away; an older one nothing.
        controller.down = False
        controller.publish(epoch=2)
        calls = controller.calls
        await until(lambda: controller.calls > calls + 2)
        assert (await collect(made, request("r1")))[0] == fake.expected_tokens((1, 2), 50)
        controller.publish(entry, epoch=3)
        await until(lambda: made.table.epoch == 3)
        controller.publish(epoch=1)
        await asyncio.sleep(0.2)
        assert made.table.epoch == 3


async def test_a_group_that_leaves_the_table_ends_its_streams_first(processes):
    _, one = processes.start("a", step_s=0.01)
    _, two = processes.start("b")
    controller = Controller(one, two)
    async with dispatcher(controller) as made:
        task = asyncio.create_task(collect(made, request("r", max_tokens=40)))
        await until(lambda: made._connections["a"].streams == 1)
        controller.publish(two)
        await until(lambda: made.table.version == 2)
        assert (await collect(made, request("r2")))[0] == fake.expected_tokens((1, 2), 50)
        assert (await task)[0] == fake.expected_tokens((1, 2), 40)
        await until(lambda: set(made._connections) == {"b"})
        assert not made.events


async def test_another_secret_or_another_group_is_not_used(processes):
    _, foreign = processes.start("a", secret=b"another secret")
    _, moved = processes.start("new name")
    moved = GroupEntry("d", "old name", moved.host, moved.port)
    async with dispatcher(Controller(foreign, moved), wait=False) as made:
        _, last = await collect(made, request("r"))
        assert last.error_code == "no_group"
        assert "another secret" in str(made._connections["a"].failure)
        assert "'new name' answers there" in str(made._connections["old name"].failure)


async def test_a_server_that_talks_garbage_is_survived():
    async def garbage(reader, writer):
        writer.write(random.randbytes(500))
        await asyncio.sleep(0.01)
        writer.close()

    server = await asyncio.start_server(garbage, "127.0.0.1", 0)
    connection = GroupConnection("g", *server.sockets[0].getsockname(), SECRET)
    connection.start()
    await until(lambda: connection.failure not in (None, "not connected yet"))
    assert not connection.connected
    with pytest.raises(GroupLost, match="no connection to group g"):
        connection.open(request("r"))
    await connection.close()
    server.close()


async def test_a_broken_connection_is_made_again(processes):
    _, entry = processes.start("a", step_s=0.005)
    async with dispatcher(Controller(entry)) as made:
        connection = made._connections["a"]
        task = asyncio.create_task(collect(made, request("r", max_tokens=100)))
        await until(lambda: connection.streams == 1)
        await asyncio.sleep(0.1)
        assert connection._link is not None
        connection._link.close("pulled out")
        tokens, _ = await task
        assert tokens == fake.expected_tokens((1, 2), 100)
        assert made.events == [("continuation", "a")]


async def test_a_silent_group_is_given_up(monkeypatch):
    monkeypatch.setattr("loraplex.cluster.connection.PING_EVERY_S", 0.05)
    monkeypatch.setattr("loraplex.cluster.connection.DEAD_AFTER_S", 0.3)
    front = GroupFront(FrontConfig("a", SECRET))
    await front.start()
    rank = fake.start_rank(front.rank_link)
    await front.wait_ready(10)
    connection = GroupConnection("a", "127.0.0.1", front.port, SECRET)
    connection.start()
    await until(lambda: connection.connected)
    stream = connection.open(request("r", (fake.HANG,)))
    with pytest.raises(GroupLost, match=r"nothing heard for 0\.3 s"):
        await stream.next()
    await connection.close()
    rank.kill()
    await front.close()
    rank.wait()


def test_gateways_and_fronts_import_neither_torch_nor_ray():
    code = (
        "import sys, loraplex.cluster.dispatch, loraplex.workers as w; w.GroupFront; "
        "print([m for m in ('torch', 'ray') if m in sys.modules])"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout.strip() == "[]"


class Scripted(GroupConnection):
    """Groups that do what a test says: `script[group]` holds, for each request that is opened,
    the outputs that it gets, the last of which may be an exception."""

    script: dict[str, list[list[TokenOutput | Exception]]]
    opened: list[tuple[str, GenerationRequest]]

    def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    @property
    def connected(self) -> bool:
        return True

    def open(self, request: GenerationRequest):
        self.opened.append((self.group, request))
        answers = iter(self.script[self.group].pop(0))

        class Stream:
            async def next(self):
                answer = next(answers)
                if isinstance(answer, Exception):
                    raise answer
                return answer

            def close(self):
                pass

        return Stream()


def scripted(patch: pytest.MonkeyPatch, **script: list[list[TokenOutput | Exception]]):
    """Dispatches to groups "a", "b", ... that follow their scripts; what was opened."""
    opened: list[tuple[str, GenerationRequest]] = []
    kind = type("Scripted", (Scripted,), {"script": script, "opened": opened})
    patch.setattr("loraplex.cluster.dispatch.GroupConnection", kind)
    patch.setattr("loraplex.cluster.dispatch._FULL_S", 0.02)
    return Controller(*(GroupEntry("d", name, "127.0.0.1", 1) for name in script)), opened


FULL = TokenOutput("r", finish_reason="error", error_code="overloaded", error="full")


def some(*tokens: int, end: bool = False) -> TokenOutput:
    return TokenOutput("r", list(tokens), finish_reason="length" if end else None)


async def test_a_group_that_was_full_at_first_may_go_on_with_what_another_lost(monkeypatch):
    controller, opened = scripted(
        monkeypatch,
        a=[[FULL], [some(3, end=True)]],
        b=[[some(1), some(2), GroupLost("gone")]],
    )
    async with dispatcher(controller, wait=False) as made:
        tokens, last = await collect(made, request("r", max_tokens=3))
    assert (tokens, last.finish_reason) == ([1, 2, 3], "length")
    assert [(group, r.output_ids) for group, r in opened] == [("a", ()), ("b", ()), ("a", (1, 2))]


async def test_what_has_begun_waits_for_room_and_what_has_not_is_refused_at_once(monkeypatch):
    lost = [some(1), GroupLost("gone")]
    controller, opened = scripted(
        monkeypatch, a=[lost], b=[[FULL], [FULL], [FULL], [some(2, end=True)], [FULL]]
    )
    async with dispatcher(controller, wait=False) as made:
        made._choose = lambda table, ask, loads, exclude: choose(
            table, ask, loads, exclude | ({"a"} if opened else set())
        )
        tokens, last = await collect(made, request("r", max_tokens=2))
        assert (tokens, last.error_code) == ([1, 2], None)
        assert [group for group, _ in opened] == ["a", *"bbbb"]
        _, last = await collect(made, request("r", max_tokens=2))
        assert last.error_code == "overloaded"
        assert [group for group, _ in opened] == ["a", *"bbbbb"]


async def test_a_full_group_is_not_asked_for_ever(monkeypatch):
    controller, _ = scripted(
        monkeypatch, a=[[some(1), GroupLost("gone")]], b=[[FULL] for _ in range(1000)]
    )
    limits = DispatchLimits(patience_s=0.1, continuation_patience_s=0.2, poll_s=0.05)
    async with dispatcher(controller, limits, wait=False) as made, asyncio.timeout(5):
        tokens, last = await collect(made, request("r", max_tokens=2))
    assert (tokens, last.error_code) == ([1], "overloaded")


async def test_an_answer_that_is_whole_is_no_failure_however_often_its_groups_failed(monkeypatch):
    script = {name: [[some(i), GroupLost("gone")]] for i, name in enumerate("abc")}
    controller, _ = scripted(monkeypatch, **script)
    limits = DispatchLimits(max_continuations=2, poll_s=0.05)
    async with dispatcher(controller, limits, wait=False) as made:
        tokens, last = await collect(made, request("r", max_tokens=3))
    assert (tokens, last.finish_reason, last.error_code) == ([0, 1, 2], "length", None)
