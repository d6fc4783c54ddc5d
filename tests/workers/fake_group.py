"""A group without a model: deterministic tokens, real sockets, real processes.

Run as a script it is one rank (`rank HOST PORT SECRET RANK STEP_S FAIL`), one of two whose steps
are collectives (`collective HOST PORT SECRET RANK RENDEZVOUS`), or a whole group, a front with its
rank (`group NAME SECRET STEP_S`), which prints "PORT RANK_PID" once it is ready.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Any

from loraplex.workers import (
    AdapterRef,
    EngineReport,
    FrontConfig,
    GenerationRequest,
    GroupFront,
    LinkAddress,
    TokenOutput,
    run_rank,
)

VOCABULARY = 4096
# Prompts that start with one of these make the engine misbehave.
RAISE, DIE, HANG, SPIN, STOP, ABSENT = 9001, 9002, 9003, 9004, 9005, 9006
FLOOD = 4  # requests that make a tenant one that floods the group, says its report
LARGE = 9007  # the first output has as many bytes as the next token says


def state_of(seed: int, tokens: tuple[int, ...] | list[int], state: int = 0) -> int:
    return zlib.crc32(array("q", tokens).tobytes(), state or zlib.crc32(b"%d" % seed))


def expected_tokens(prompt: tuple[int, ...], count: int, seed: int = 0) -> list[int]:
    """What any fake engine generates for a prompt: each token depends on the whole history."""
    state, out = state_of(seed, prompt), []
    for _ in range(count):
        out.append(state % VOCABULARY)
        state = state_of(seed, [out[-1]], state)
    return out


class FakeEngine:
    """One token for every request in each step; a step takes `step_s`."""

    def __init__(self, step_s: float):
        self._step_s = step_s
        self._running: dict[str, tuple[GenerationRequest, int, int]] = {}
        self._report = EngineReport(pool_bytes_total=1000, max_running=8, end_s=1.0)

    def submit(self, request: GenerationRequest) -> None:
        history = request.prompt_ids + request.output_ids
        state = state_of(request.sampling.seed, request.prompt_ids)
        for token in request.output_ids:
            state = state_of(request.sampling.seed, [token], state)
        if history[0] == RAISE:
            raise RuntimeError("boom")
        self._running[request.request_id] = (request, state, len(request.output_ids))

    def abort(self, request_id: str) -> None:
        self._running.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self._running)

    def step(self) -> list[TokenOutput]:
        if self._step_s:
            time.sleep(self._step_s)
        outputs = []
        for request_id, (request, state, count) in list(self._running.items()):
            if request.prompt_ids[0] == DIE:
                os.kill(os.getpid(), signal.SIGKILL)
            if request.prompt_ids[0] == HANG:
                time.sleep(3600)
            if request.prompt_ids[0] == STOP:
                os.kill(os.getpid(), signal.SIGSTOP)
            while request.prompt_ids[0] == SPIN:
                pass
            token, count = state % VOCABULARY, count + 1
            out = TokenOutput(request_id, [token])
            if count == len(request.output_ids) + 1:
                out.tier, out.cached_tokens = "base", 3
                if request.prompt_ids[0] == LARGE:
                    out.tier = "x" * request.prompt_ids[1]
            if count >= request.sampling.max_tokens:
                out.finish_reason = "length"
                del self._running[request_id]
            else:
                state = state_of(request.sampling.seed, [token], state)
                self._running[request_id] = (request, state, count)
            outputs.append(out)
        self._report.steps += 1
        return outputs

    def set_desired(self, adapters: list[AdapterRef]) -> None:
        self._report.gpu = {a.key: 100 for a in adapters}

    def keep_on_host(self, adapters: list[AdapterRef]) -> None:
        self._report.host = {a.key: 100 for a in adapters}

    def purge(self, key: str) -> None:
        self._report.gpu.pop(key, None)

    def report(self) -> EngineReport:
        self._report.running = len(self._running)
        tenants = Counter(request.tenant_id for request, *_ in self._running.values())
        self._report.floods = {t: (n, float(n)) for t, n in tenants.items() if n >= FLOOD}
        return self._report

    def close(self) -> None:
        self._running.clear()


@dataclass(frozen=True)
class FakeProgram:
    """Followers idle until their process is ended, as one that waits in a collective does."""

    step_s: float = 0.0
    fail: str = ""  # "build" or "follow"

    def build(self, rendezvous: str) -> FakeEngine:
        if self.fail == "build":
            raise FileNotFoundError("no model there")
        return FakeEngine(self.step_s)

    def follow(self, rank: int, rendezvous: str) -> None:
        if self.fail == "follow":
            raise RuntimeError("a follower broke")
        time.sleep(3600)


def _join(rank: int, rendezvous: str) -> tuple[Any, Any]:
    """The ranks' collectives, and a tensor for them. The other programs need no torch."""
    import torch
    from loraplex.workers.comm import Comm

    return Comm(rank, 2, rendezvous), torch.ones(1)


class CollectiveEngine(FakeEngine):
    """Every step takes both ranks."""

    def __init__(self, rendezvous: str):
        super().__init__(0.01)
        self._comm, self._one = _join(0, rendezvous)

    def step(self) -> list[TokenOutput]:
        prompts = [request.prompt_ids[0] for request, _, _ in self._running.values()]
        self._comm.broadcast_message(prompts)
        self._comm.all_reduce(self._one)
        return super().step()


class CollectiveProgram(FakeProgram):
    """The follower takes part in every step but those with a prompt that begins with ABSENT."""

    def build(self, rendezvous: str) -> FakeEngine:
        return CollectiveEngine(rendezvous)

    def follow(self, rank: int, rendezvous: str) -> None:
        comm, one = _join(rank, rendezvous)
        while ABSENT not in comm.broadcast_message():
            comm.all_reduce(one)
        while True:
            pass


class Unreadable(FakeProgram):
    """Can't be unpickled in the rank's process."""

    def __setstate__(self, state: object) -> None:
        raise ValueError("this program can't be unpickled")


def start_rank(
    link: LinkAddress, rank: int = 0, step_s: float = 0.0, fail: str = ""
) -> subprocess.Popen[str]:
    args = ["rank", link.host, link.port, link.secret.hex(), rank, step_s, fail]
    return _start(args)


def start_collective_rank(link: LinkAddress, rank: int, rendezvous: str) -> subprocess.Popen[str]:
    return _start(["collective", link.host, link.port, link.secret.hex(), rank, rendezvous])


def start_group(name: str, secret: bytes, step_s: float = 0.0) -> subprocess.Popen[str]:
    return _start(["group", name, secret.hex(), step_s])


def _start(args: list[object]) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


async def _serve_group(name: str, secret: bytes, step_s: float) -> None:
    front = GroupFront(FrontConfig(name, secret))
    await front.start()
    rank = start_rank(front.rank_link, step_s=step_s)
    await front.wait_ready(10)
    print(front.port, rank.pid, flush=True)
    await asyncio.Event().wait()


def main(kind: str, *args: str) -> int:
    if kind == "group":
        name, secret, step_s = args
        asyncio.run(_serve_group(name, bytes.fromhex(secret), float(step_s)))
        return 0
    host, port, secret, rank, *rest = args
    link = LinkAddress(host, int(port), bytes.fromhex(secret))
    if kind == "collective":
        return run_rank(CollectiveProgram(), int(rank), rest[0], link)
    step_s, fail = rest
    return run_rank(FakeProgram(float(step_s), fail), int(rank), "tcp://127.0.0.1:1", link)


if __name__ == "__main__":
    os._exit(main(*sys.argv[1:]))
