"""A group's front over real sockets, with a rank in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest
from loraplex.workers import (
    ClientHandshake,
    FrontConfig,
    GenerationRequest,
    GroupFailed,
    GroupFront,
    SamplingParams,
    WireAuthError,
)
from loraplex.workers import wire as w

from tests.workers import fake_group as fake

SECRET = b"cluster secret"


class Client:
    """A bare gateway: frames in and out, nothing granted by itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer
        self.decoder = w.FrameDecoder()
        self.frames: list[w.Frame] = []
        self.ready: w.Frame = {}
        self.tokens: dict[str, list[int]] = {}
        self.final: dict[str, w.Frame] = {}
        self.batches = 0
        self.load: w.Frame = {}

    @classmethod
    async def connect(cls, port: int, secret: bytes = SECRET) -> Client:
        client = cls(*await asyncio.open_connection("127.0.0.1", port))
        handshake = ClientHandshake(secret)
        client.send(handshake.auth(await client.frame()))
        client.ready = handshake.check(await client.frame())
        return client

    def send(self, frame: w.Frame) -> None:
        self.writer.write(w.encode(frame))

    def submit(
        self, request_id: str, prompt=(1, 2), max_tokens=8, credit=10_000, seed=0, **kw
    ) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, seed=seed)
        kw.setdefault("tenant_id", "tenant")
        request = GenerationRequest(request_id, tuple(prompt), sampling, **kw)
        self.tokens[request_id] = []
        self.send({"t": "submit", "req": request.to_wire(), "credit": credit})

    async def frame(self) -> w.Frame:
        while not self.frames:
            data = await asyncio.wait_for(self.reader.read(1 << 16), 20)
            if not data:
                raise EOFError
            self.frames += self.decoder.feed(data)
        return self.frames.pop(0)

    async def pump(self) -> w.Frame:
        """Takes one frame in."""
        frame = await self.frame()
        if frame["t"] == "batch":
            self.batches += 1
            self.load = frame["load"]
            for output in frame["out"]:
                self.tokens[output["id"]] += output["tok"]
                if "finish_reason" in output:
                    assert output["id"] not in self.final
                    self.final[output["id"]] = output
        return frame

    async def finish(self, *request_ids: str) -> None:
        while not set(request_ids) <= set(self.final):
            await self.pump()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


@contextlib.asynccontextmanager
async def group(step_s=0.0, ranks=1, fail="", wait=True, on_trace=None, **config):
    front = GroupFront(FrontConfig("g", SECRET, ranks=ranks, **config), on_trace)
    await front.start()
    processes = [
        fake.start_rank(front.rank_link, rank, step_s, fail if rank == ranks - 1 else "")
        for rank in range(ranks)
    ]
    try:
        if wait:
            await front.wait_ready(20)
        yield front, processes
    finally:
        await front.close()
        for process in processes:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def until(condition, timeout_s=10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def test_many_streams_of_two_gateways_get_their_own_tokens():
    rng = random.Random()
    async with group() as (front, _):
        clients = [await Client.connect(front.port) for _ in range(2)]
        prompts = {}
        for i in range(60):
            prompt = tuple(rng.randrange(4096) for _ in range(rng.randrange(1, 30)))
            prompts[f"r{i}"] = prompt, rng.randrange(1, 50), rng.randrange(99)
            for client in clients:  # the same ids on both
                client.submit(f"r{i}", prompt, prompts[f"r{i}"][1], seed=prompts[f"r{i}"][2])
        for client in clients:
            await client.finish(*prompts)
            for name, (prompt, count, seed) in prompts.items():
                assert client.tokens[name] == fake.expected_tokens(prompt, count, seed)
                assert client.final[name]["finish_reason"] == "length"
        assert front.open == 0
        assert clients[0].load["queued"] + clients[0].load["running"] <= 60


async def test_a_step_costs_one_message_per_gateway():
    async with group(step_s=0.02) as (front, _):
        client = await Client.connect(front.port)
        for i in range(20):
            client.submit(f"r{i}", max_tokens=10)
        await client.finish(*(f"r{i}" for i in range(20)))
        assert sum(map(len, client.tokens.values())) == 200
        assert client.batches <= 20  # one for each step; the 20 may have started over some steps


async def test_abort_and_a_lost_connection_free_the_engine():
    async with group(step_s=0.005) as (front, _):
        stays, leaves = await Client.connect(front.port), await Client.connect(front.port)
        for i in range(5):
            stays.submit(f"r{i}", max_tokens=100_000)
            leaves.submit(f"r{i}", max_tokens=100_000)
        await until(lambda: front.report.running == 10)
        stays.send({"t": "abort", "id": "r0"})
        stays.send({"t": "abort", "id": "never was"})
        await until(lambda: front.report.running == 9)
        leaves.writer.transport.abort()
        await until(lambda: front.report.running == 4)
        assert front.open == 4
        await stays.close()
        await until(lambda: front.report.running == 0)


async def test_a_stream_without_credit_waits_and_the_others_go_on():
    async with group() as (front, _):
        client = await Client.connect(front.port)
        client.submit("slow", (5,), max_tokens=50, credit=7)
        client.submit("fast", (6,), max_tokens=300)
        await client.finish("fast")
        assert client.tokens["fast"] == fake.expected_tokens((6,), 300)
        assert client.tokens["slow"] == fake.expected_tokens((5,), 7)
        client.send({"t": "credit", "id": "slow", "n": 3})
        while len(client.tokens["slow"]) < 10:
            await client.pump()
        assert "slow" not in client.final
        client.send({"t": "credit", "id": "slow", "n": 100})
        await client.finish("slow")
        assert client.tokens["slow"] == fake.expected_tokens((5,), 50)


@pytest.mark.parametrize("limit", [w.MAX_FRAME_BYTES, 20_000])
async def test_an_output_too_large_for_a_frame_ends_its_request_in_the_engine(limit, monkeypatch):
    # The rank's limit stays: with less than that here, the front is first to find it too large.
    monkeypatch.setattr(w, "MAX_FRAME_BYTES", limit)
    async with group(step_s=0.01) as (front, _):
        client = await Client.connect(front.port)
        client.submit("large", (fake.LARGE, limit + 1), max_tokens=100_000)
        client.submit("small", max_tokens=50)
        await client.finish("large", "small")
        assert client.final["large"]["error_code"] == "response_too_large"
        assert "ask for fewer logprobs" in client.final["large"]["error"]
        assert client.tokens["small"] == fake.expected_tokens((1, 2), 50)
        await until(lambda: front.report.running == 0)
        assert front.open == 0


async def test_tokens_held_for_slow_clients_are_bounded():
    async with group(max_held_tokens=500) as (front, _):
        client = await Client.connect(front.port)
        client.submit("greedy", max_tokens=100_000, credit=1)
        client.submit("modest", (8,), max_tokens=100, credit=20)
        await client.finish("greedy")
        assert client.final["greedy"]["error_code"] == "client_too_slow"
        client.send({"t": "credit", "id": "modest", "n": 100})
        await client.finish("modest")
        assert client.tokens["modest"] == fake.expected_tokens((8,), 100)
        await until(lambda: front.report.running == 0)


async def test_a_gateway_that_does_not_read_its_socket_does_not_block_another():
    async with group(max_held_tokens=100_000) as (front, _):
        deaf, good = await Client.connect(front.port), await Client.connect(front.port)
        for i in range(20):
            deaf.submit(f"r{i}", max_tokens=10**9, credit=1 << 31)
        deaf.reader._transport.pause_reading()  # type: ignore[attr-defined]
        good.submit("r", (3,), max_tokens=400)
        await good.finish("r")
        assert good.tokens["r"] == fake.expected_tokens((3,), 400)
        # Its socket fills, then the bound on held tokens ends its streams.
        await until(lambda: front.report.running == 0, 60)
        buffered = sum(link.transport.get_write_buffer_size() for link in front._gateways.values())
        assert buffered < 3 << 20


async def test_admission_is_bounded():
    async with group(step_s=0.01, max_open=3) as (front, _):
        client = await Client.connect(front.port)
        for i in range(5):
            client.submit(f"r{i}", max_tokens=5, tenant_id=f"tenant-{i}")
        await client.finish("r3", "r4")
        assert {client.final[r]["error_code"] for r in ("r3", "r4")} == {"overloaded"}
        await client.finish("r0", "r1", "r2")
        client.submit("again", max_tokens=2)
        await client.finish("again")
        assert client.final["again"]["finish_reason"] == "length"


async def test_a_full_group_takes_what_another_has_begun():
    async with group(step_s=0.01, max_open=3) as (front, _):
        client = await Client.connect(front.port)
        begun = fake.expected_tokens((1, 2), 20)
        for i in range(3):
            client.submit(f"r{i}", max_tokens=20, tenant_id=f"tenant-{i}")
        for i in range(4):
            client.submit(f"moved{i}", max_tokens=20, output_ids=tuple(begun[:5]))
        client.submit("new", max_tokens=20, tenant_id="new")
        await client.finish("new", *(f"r{i}" for i in range(3)), *(f"moved{i}" for i in range(4)))
        refused = {r for r, last in client.final.items() if "error_code" in last}
        assert refused == {"moved3", "new"}
        assert all(client.tokens[f"moved{i}"] == begun[5:] for i in range(3))


async def test_a_flood_of_one_tenant_leaves_places_for_others():
    async with group(step_s=0.01, max_open=8) as (front, _):
        client = await Client.connect(front.port)
        for i in range(20):
            client.submit(f"flood{i}", max_tokens=20)
        client.submit("other", max_tokens=5, tenant_id="other")
        going_on = fake.expected_tokens((1, 2), 6)
        client.submit("moved", max_tokens=6, output_ids=tuple(going_on[:2]))
        await client.finish("other", "moved", *(f"flood{i}" for i in range(20)))
        refused = [r for r, last in client.final.items() if "error_code" in last]
        assert refused == [f"flood{i}" for i in range(4, 20)]
        assert client.tokens["moved"] == going_on[2:]
        client.submit("again", max_tokens=2)
        await client.finish("again")
        assert client.final["again"]["finish_reason"] == "length"


async def test_a_wrong_secret_is_refused():
    async with group(wait=False) as (front, _):
        with pytest.raises(WireAuthError, match="another secret"):
            await Client.connect(front.port, b"another secret")
        # The cluster secret doesn't open the link of the ranks.
        with pytest.raises(WireAuthError, match="another secret"):
            await Client.connect(front.rank_link.port, SECRET)


async def test_garbage_reaches_nobody_else():
    rng = random.Random()
    async with group(step_s=0.001) as (front, _):
        good = await Client.connect(front.port)
        good.submit("r", max_tokens=300)
        for _ in range(30):
            _, writer = await asyncio.open_connection("127.0.0.1", front.port)
            writer.write(rng.randbytes(rng.randrange(1, 3000)))
            writer.close()
        bad_frames = [
            {"t": "submit"},
            {"t": "submit", "req": {"id": 7}, "credit": 1},
            {"t": "submit", "req": {"id": "x"}, "credit": 0},
            {"t": "credit", "id": "r"},
            {"t": "abort", "id": ["r"]},
            {"t": "desired", "keys": []},
        ]
        for bad in bad_frames:
            client = await Client.connect(front.port)
            client.send(bad)
            frame = await client.frame()
            while frame["t"] != "error":
                frame = await client.frame()
            assert frame["code"] == "protocol"
        for port in (front.port, front.rank_link.port):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
        # A request that the engine can't read ends alone.
        whole = GenerationRequest("odd", (1, 2), SamplingParams(), "tenant").to_wire()
        for broken in ({"id": "broken", "prompt": 5}, {**whole, "prompt": ["a", None]}):
            good.tokens[broken["id"]] = []
            good.send({"t": "submit", "req": broken, "credit": 1})
            await good.finish(broken["id"])
            assert good.final[broken["id"]]["error_code"] == "bad_request"
        await good.finish("r")
        assert good.tokens["r"] == fake.expected_tokens((1, 2), 300)


async def test_an_exception_in_the_engine_ends_every_stream_with_its_text():
    async with group(step_s=0.005) as (front, [rank]):
        clients = [await Client.connect(front.port) for _ in range(2)]
        for client in clients:
            client.submit("r0", max_tokens=100_000)
            client.submit("r1", max_tokens=100_000)
        await until(lambda: front.report.running == 4)
        clients[0].submit("bad", (fake.RAISE,))
        await clients[0].finish("r0", "r1", "bad")
        await clients[1].finish("r0", "r1")
        for output in (*clients[0].final.values(), *clients[1].final.values()):
            assert output["error_code"] == "engine_failed"
            assert "RuntimeError: boom" in output["error"]
        assert rank.wait(10) == 1
        assert front.failure is not None
        assert "boom" in front.failure
        clients[1].submit("late")
        await clients[1].finish("late")
        assert clients[1].final["late"]["error_code"] == "draining"


async def test_a_killed_rank_fails_the_group():
    async with group(step_s=0.005, ranks=2) as (front, ranks):
        client = await Client.connect(front.port)
        client.submit("r", max_tokens=100_000)
        await until(lambda: front.report.running == 1)
        ranks[1].send_signal(signal.SIGKILL)
        await client.finish("r")
        assert client.final["r"]["error_code"] == "group_failed"
        assert "rank 1 is gone" in client.final["r"]["error"]


@pytest.mark.parametrize("prompt", [fake.HANG, fake.SPIN])
async def test_a_step_that_doesnt_end_fails_the_group_and_ends_its_processes(prompt):
    async with group(step_s=0.005, ranks=2, step_timeout_s=1.5) as (front, ranks):
        client = await Client.connect(front.port)
        client.submit("other", max_tokens=100_000)
        await until(lambda: front.report.running == 1)
        client.submit("r", (prompt,))
        await client.finish("r", "other")
        for output in client.final.values():
            assert output["error_code"] == "group_failed"
            assert "rank 0 has been in one step for" in output["error"]
            assert "raise step_timeout_s (1.5 s)" in output["error"]
        assert [rank.wait(5) for rank in ranks] == [-signal.SIGKILL] * 2


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_stopped_rank_fails_the_group_and_ends_its_processes(rank):
    async with group(step_s=0.005, ranks=2, beat_timeout_s=1.5) as (front, ranks):
        client = await Client.connect(front.port)
        client.submit("r", max_tokens=100_000)
        await until(lambda: front.report.running == 1)
        if rank == 0:
            client.submit("stop", (fake.STOP,))
        else:
            ranks[1].send_signal(signal.SIGSTOP)
        await client.finish("r")
        assert client.final["r"]["error_code"] == "group_failed"
        assert f"the process of rank {rank} has sent nothing for" in client.final["r"]["error"]
        assert [process.wait(5) for process in ranks] == [-signal.SIGKILL] * 2


async def test_a_collective_that_a_rank_doesnt_come_to_fails_the_group():
    front = GroupFront(FrontConfig("g", SECRET, ranks=2, step_timeout_s=1.5))
    await front.start()
    rendezvous = f"tcp://127.0.0.1:{free_port()}"
    ranks = [fake.start_collective_rank(front.rank_link, rank, rendezvous) for rank in range(2)]
    try:
        await front.wait_ready(30)
        client = await Client.connect(front.port)
        client.submit("r", max_tokens=20)
        await client.finish("r")
        assert client.tokens["r"] == fake.expected_tokens((1, 2), 20)
        client.submit("stuck", (fake.ABSENT,))
        await client.finish("stuck")
        assert "it hangs, or waits for another rank that does" in client.final["stuck"]["error"]
        assert [rank.wait(5) for rank in ranks] == [-signal.SIGKILL] * 2
    finally:
        await front.close()
        for rank in ranks:
            rank.kill()
            rank.wait()


async def test_slow_steps_idle_time_and_a_front_that_was_held_up_are_no_hang():
    async with group(step_s=0.8, ranks=2, beat_timeout_s=1.2, step_timeout_s=1.5) as (front, _):
        client = await Client.connect(front.port)
        await asyncio.sleep(2)
        client.submit("r", max_tokens=4)
        await client.finish("r")
        time.sleep(2)
        await asyncio.sleep(1)
        assert front.failure is None
        client.submit("again", max_tokens=1)
        await client.finish("again")
        assert client.tokens["again"] == fake.expected_tokens((1, 2), 1)


async def test_a_stopped_rank_ends_when_the_front_closes(monkeypatch):
    monkeypatch.setattr("loraplex.workers.front.group_front._STOP_S", 0.3)
    async with group() as (front, [rank]):
        rank.send_signal(signal.SIGSTOP)
        await front.close()
        assert rank.wait(5) == -signal.SIGKILL


async def test_a_rank_that_fails_to_start_says_why():
    async with group(fail="build", wait=False) as (front, [rank]):
        with pytest.raises(GroupFailed, match="FileNotFoundError: no model there"):
            await front.wait_ready(20)
        assert rank.wait(10) == 1
    async with group(fail="follow", ranks=2, wait=False) as (front, _):
        await until(lambda: front.failure is not None)
        assert "rank 1 failed: RuntimeError: a follower broke" in str(front.failure)


async def test_ranks_end_when_their_front_goes_without_a_word():
    process = fake.start_group("g", SECRET)
    assert process.stdout is not None
    _, pid = map(int, process.stdout.readline().split())
    process.kill()
    process.wait()

    def gone() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        # Nobody may have reaped it here.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] == "Z"

    await until(gone, 15)


async def test_draining_ends_open_requests_first():
    async with group(step_s=0.01) as (front, _):
        client = await Client.connect(front.port)
        client.submit("r", max_tokens=40)
        while not client.tokens["r"]:
            await client.pump()
        drained = asyncio.create_task(front.drain(20))
        while (await client.pump())["t"] != "draining":
            pass
        client.submit("late")
        await client.finish("late", "r")
        assert client.final["late"]["error_code"] == "draining"
        assert client.tokens["r"] == fake.expected_tokens((1, 2), 40)
        assert await drained


async def test_draining_gives_up_after_its_time():
    async with group(step_s=0.01) as (front, _):
        client = await Client.connect(front.port)
        client.submit("r", max_tokens=100_000)
        await until(lambda: front.open == 1)
        assert not await front.drain(0.1)
        await front.close()
        await client.finish("r")
        assert client.final["r"]["error_code"] == "group_failed"


async def test_ranks_end_by_themselves_when_the_front_closes():
    async with group() as (front, [rank]):
        await front.close()
        assert rank.wait(5) == 0


async def test_advice_reaches_the_engine_and_residency_the_gateways():
    async with group() as (front, _):
        client = await Client.connect(front.port)
        assert client.ready["group"] == "g"
        front.advise(["t/aa", "t/bb"], [])
        frame = await client.frame()
        while frame["t"] != "report" or frame["gpu"] != ["t/aa", "t/bb"]:
            frame = await client.frame()
        version = frame["load"]["resident_version"]
        front.advise(["t/aa", "t/bb"], ["t/aa"])
        while frame["t"] != "report" or frame["gpu"] != ["t/bb"]:
            frame = await client.frame()
        assert frame["load"]["resident_version"] > version


async def test_the_engine_is_told_what_its_node_should_keep_in_memory_when_it_changes():
    async with group() as (front, _):
        front.advise([], [], ["t/aa"])
        await until(lambda: list(front.report.host) == ["t/aa"])
        front.advise([], [], None)  # another group of the node is told
        front.advise([], [], ["t/bb", "t/aa"])
        await until(lambda: sorted(front.report.host) == ["t/aa", "t/bb"])
        front.advise([], [], [])
        await until(lambda: not front.report.host)


async def test_a_silent_gateway_is_dropped(monkeypatch):
    monkeypatch.setattr("loraplex.workers.front.group_front.PING_EVERY_S", 0.05)
    monkeypatch.setattr("loraplex.workers.front.group_front.DEAD_AFTER_S", 0.5)
    async with group(step_s=0.01) as (front, _):
        silent, speaks = await Client.connect(front.port), await Client.connect(front.port)
        for client in (silent, speaks):
            client.submit("r", max_tokens=100_000)
        await until(lambda: front.open == 2)
        for _ in range(20):
            speaks.send({"t": "ping"})
            await asyncio.sleep(0.05)
        assert front.open == 1


async def test_a_connection_that_never_authenticates_is_closed(monkeypatch):
    monkeypatch.setattr("loraplex.workers.front.front_links.HANDSHAKE_TIMEOUT_S", 0.2)
    async with group(wait=False) as (front, _):
        reader, _ = await asyncio.open_connection("127.0.0.1", front.port)
        rest = await asyncio.wait_for(reader.read(), 5)
        assert b"no authentication within" in rest


async def test_an_idle_group_takes_no_cpu():
    async with group() as (_, [rank]):
        await asyncio.sleep(0.5)

        def cpu_s() -> float:
            fields = Path(f"/proc/{rank.pid}/stat").read_text().rsplit(")")[-1].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        before = cpu_s()
        await asyncio.sleep(2)
        assert cpu_s() - before < 0.2


async def test_traces_are_told_of_requests_that_carry_a_traceparent():
    told = []
    async with group(on_trace=told.append) as (front, _):
        client = await Client.connect(front.port)
        parent = f"00-{'a' * 32}-{'b' * 16}-01"
        for name, traceparent in (("traced", parent), ("plain", None)):
            params = SamplingParams(max_tokens=3)
            request = GenerationRequest(name, (1, 2), params, "t", traceparent=traceparent)
            client.tokens[name] = []
            client.send({"t": "submit", "req": request.to_wire(), "credit": 100})
        await client.finish("traced", "plain")
    (trace,) = told
    assert trace.traceparent == parent
    assert trace.attributes["loraplex.request"] == "traced"
    assert trace.error_code is None
