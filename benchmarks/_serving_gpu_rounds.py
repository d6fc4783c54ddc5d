"""Rounds of streams at the service, for benchmarks/serving_gpu.py."""

from __future__ import annotations

import os
import time
from typing import Any

from _serving_gpu_client import Adapter, Answer, Connection, ask_all, request
from _serving_gpu_plan import Plan
from _serving_gpu_report import latencies
from _serving_gpu_service import Service, engine_counters

_WARM_ROUNDS = 2
_PAGE_IN = 4  # adapters paged in at once: the disk tier has room for that many
_PAGE_IN_PASSES = 5


async def measure_streams(plan: Plan, served: Service, adapters: list[Adapter]) -> dict[str, Any]:
    """Pages all adapters in, then runs the rounds.

    Raises:
        RuntimeError: an answer failed or isn't whole, or an adapter wasn't in the pool.
    """
    connections = [await Connection.open(served.url) for _ in range(plan.streams)]
    await _page_in(plan, served.url, connections, adapters)
    for _ in range(_WARM_ROUNDS):
        await _round(plan, served.url, connections, adapters)
    before, used = engine_counters(served), _cpu_seconds(served)
    rounds = [await _round(plan, served.url, connections, adapters) for _ in range(plan.rounds)]
    used_since = {k: s - used.get(k, 0.0) for k, s in _cpu_seconds(served).items()}
    engine = {k: v - before[k] for k, v in engine_counters(served).items()}
    for connection in connections:
        connection.close()
    seconds = [max(a.ended for a in answers) - began for began, answers in rounds]
    answers = [a for _, some in rounds for a in some]
    if moved := {a.tier for a in answers} - {"gpu"}:
        raise RuntimeError(f"adapters came from {sorted(moved)} in the timed rounds")
    return {
        "tokens_s": [plan.streams * plan.tokens / s for s in seconds],
        "latency_ms": latencies([(a.sent, a.events) for a in answers]),
        "events_per_read": sum(len(a.events) for a in answers) / sum(a.reads for a in answers),
        "engine": {
            "steps": engine["steps"],
            "tokens_s_in_steps": engine["tokens"] / engine["step_s"],
            "share_of_time_in_steps": engine["step_s"] / sum(seconds),
            "late_compiles": engine["late_compiles"],
        },
        "cores": {k: round(s / sum(seconds), 2) for k, s in used_since.items() if s > 0.05},
    }


async def _round(
    plan: Plan, url: str, connections: list[Connection], adapters: list[Adapter]
) -> tuple[float, list[Answer]]:
    """When it began, and the answers."""
    requests = [
        request(url, adapters[i % len(adapters)], prompt, plan.tokens)
        for i, prompt in enumerate(plan.prompts())
    ]
    return time.perf_counter(), await ask_all(connections, requests, plan.tokens)


async def _page_in(
    plan: Plan, url: str, connections: list[Connection], adapters: list[Adapter]
) -> None:
    """Asks every adapter until all of them are found in the pool."""
    tiers: list[str] = []
    for _ in range(_PAGE_IN_PASSES):
        tiers = []
        for start in range(0, len(adapters), _PAGE_IN):
            some = adapters[start : start + _PAGE_IN]
            requests = [request(url, a, p, 2) for a, p in zip(some, plan.prompts(), strict=False)]
            tiers += [a.tier for a in await ask_all(connections, requests, 2)]
        print(
            f"  adapters by tier: { {t: tiers.count(t) for t in sorted(set(tiers))} }", flush=True
        )
        if set(tiers) == {"gpu"}:
            return
    raise RuntimeError(f"not all adapters are in the pool after {_PAGE_IN_PASSES} rounds: {tiers}")


def _cpu_seconds(served: Service) -> dict[str, float]:
    times = os.times()
    return {**served.cpu_seconds(), "this client": times.user + times.system}
