"""Tokens per second of the whole service over HTTP beside those of its engine alone, on one GPU.

    python benchmarks/serving_gpu.py --out serving_gpu.json
    python benchmarks/serving_gpu.py --tiny           # a CPU: checks this program, measures nothing

12 layers of Qwen3-30B-A3B with random weights in bf16; 32 adapters of rank 16 on attention and all
experts (423 MB each); 64 requests at once, two per adapter, of 128 random tokens and 256 new ones
at temperature 1. One round is over when the last answer is; the median of rounds counts. First the
engine alone, in a process of its own with the adapters in its pool, then `loraplex serve` with the
same settings: 8 tenants upload the adapters through the REST API into the store that it starts, and
once all of them are in the pool, the requests are streamed over HTTP. The time to the first token
(TTFT) and between tokens (ITL) are those of all streams; events that come in one piece come at
one time.

Settings of both (`loraplex config` lists them) go behind: `serving_gpu.py -- haproxy=true`.
It writes 50 GB, takes about 6 minutes, and ends with exit code 1 when an answer fails or has
another number of tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _serving_gpu_client import Adapter, Answer, Connection, ask_all, request
from _serving_gpu_engine import measure_engine
from _serving_gpu_plan import Plan
from _serving_gpu_service import Service, engine_counters, publish, service
from loraplex.cluster.errors import ClusterError

BAR = 0.90
PACKAGES = ("torch", "triton", "ray", "uvicorn", "fastapi")
_WARM_ROUNDS = 2
_PAGE_IN = 4  # adapters paged in at once: the disk tier has room for that many
_PAGE_IN_PASSES = 5


class Phases:
    """How long each part took, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        print(f"{name} ...", flush=True)
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)
        print(f"{name}: {self.seconds[name]:.1f} s", flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda, cpu with --tiny")
    parser.add_argument("--rounds", type=int, help="timed ones of each; default: 8")
    parser.add_argument("--adapters", type=int, help="default: 32")
    parser.add_argument("--gateways", type=int, help="gateway replicas; default: 4")
    parser.add_argument("--dir", type=Path, help="where to write; default: the temporary folder")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    parser.add_argument("settings", nargs="*", help="name=value of engine and service, after --")
    return parser.parse_args()


def make_plan(args: argparse.Namespace, folder: Path, device: str) -> Plan:
    plan = (Plan.tiny if args.tiny else Plan.large)(folder, device)
    given = {name: getattr(args, name) for name in ("rounds", "adapters", "gateways")}
    pairs = (setting.partition("=") for setting in args.settings)
    return replace(
        plan,
        **{name: value for name, value in given.items() if value is not None},
        settings={name: value for name, _, value in pairs},
    )


def over_http(plan: Plan, phases: Phases) -> dict[str, Any]:
    """Starts the service, fills it and measures it."""
    with phases.phase("service, start"):
        running = service(plan)
        served = running.__enter__()
    try:
        with phases.phase("service, uploads"):
            adapters = publish(plan, served)
        return asyncio.run(_streams(plan, served, adapters, phases))
    finally:
        with phases.phase("service, stop"):
            running.__exit__(None, None, None)


async def _streams(
    plan: Plan, served: Service, adapters: list[Adapter], phases: Phases
) -> dict[str, Any]:
    connections = [await Connection.open(served.url) for _ in range(plan.streams)]
    with phases.phase("service, paging in"):
        await _page_in(plan, served.url, connections, adapters)

    async def round_() -> tuple[float, list[Answer]]:
        requests = [
            request(served.url, adapters[i % len(adapters)], prompt, plan.tokens)
            for i, prompt in enumerate(plan.prompts())
        ]
        began = time.perf_counter()
        answers = await ask_all(connections, requests, plan.tokens)
        return max(a.ended for a in answers) - began, answers

    with phases.phase("service, warm rounds"):
        for _ in range(_WARM_ROUNDS):
            await round_()
    answers: list[Answer] = []
    seconds: list[float] = []
    with phases.phase("service, rounds"):
        before, used = engine_counters(served), _cpu_seconds(served)
        for _ in range(plan.rounds):
            spent, got = await round_()
            seconds.append(spent)
            answers += got
        used_since = {k: s - used.get(k, 0.0) for k, s in _cpu_seconds(served).items()}
        engine = {k: v - before[k] for k, v in engine_counters(served).items()}
    for connection in connections:
        connection.close()
    if moved := {a.tier for a in answers} - {"gpu"}:
        raise RuntimeError(f"adapters came from {sorted(moved)} in the timed rounds")
    return {
        "tokens_s": [plan.streams * plan.tokens / s for s in seconds],
        "latency_ms": _latencies(answers),
        "events_per_read": sum(len(a.events) for a in answers) / sum(a.reads for a in answers),
        "engine": {
            "steps": engine["steps"],
            "tokens_s_in_steps": engine["tokens"] / engine["step_s"],
            "share_of_time_in_steps": engine["step_s"] / sum(seconds),
            "late_compiles": engine["late_compiles"],
        },
        "cores": {k: round(s / sum(seconds), 2) for k, s in used_since.items() if s > 0.01},
    }


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
        print(f"  tiers: { {tier: tiers.count(tier) for tier in sorted(set(tiers))} }", flush=True)
        if set(tiers) == {"gpu"}:
            return
    raise RuntimeError(f"not all adapters are in the pool after {_PAGE_IN_PASSES} rounds: {tiers}")


def _cpu_seconds(served: Service) -> dict[str, float]:
    times = os.times()
    return {**served.cpu_seconds(), "this client": times.user + times.system}


def _latencies(answers: list[Answer]) -> dict[str, dict[str, float]]:
    first = [a.events[0] - a.sent for a in answers]
    between = [b - a for answer in answers for a, b in zip(answer.events, answer.events[1:])]
    return {
        name: {f"p{q}": round(_percentile(times, q) * 1e3, 2) for q in (50, 99)}
        for name, times in (("ttft", first), ("itl", between))
    }


def _percentile(values: list[float], q: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[q - 1]


def measure(plan: Plan) -> dict[str, Any]:
    phases = Phases()
    with phases.phase("files"):
        plan.write_model()
        plan.write_adapter()
    with phases.phase("engine alone"), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        engine = pool.submit(measure_engine, plan).result()
    print(_rates("engine alone", engine["tokens_s"]), flush=True)
    http = over_http(plan, phases)
    share = statistics.median(http["tokens_s"]) / statistics.median(engine["tokens_s"])
    return {
        "machine": engine["machine"],
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "cpus": os.cpu_count(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "config": plan.shape.config,
        "streams": plan.streams,
        "adapters": plan.adapters,
        "adapter_bytes": plan.adapter_bytes,
        "prompt_tokens": plan.shape.prompt,
        "new_tokens": plan.tokens,
        "settings": {k: v for k, v in plan.all_settings().items() if k != "model_path"},
        "engine_alone": engine,
        "service": http,
        "share": share,
        "bar": BAR,
        "phases_s": phases.seconds,
    }


def _rates(name: str, rates: list[float]) -> str:
    median = statistics.median(rates)
    return f"{name:<24}{median:10.0f} tokens/s  ({min(rates):.0f} to {max(rates):.0f})"


def show(result: dict[str, Any]) -> None:
    http, engine = result["service"], result["engine_alone"]
    print(f"\n{result['machine']}, {result['cpus']} cores, {result['versions']}")
    print(_rates("engine alone", engine["tokens_s"]))
    print(_rates("service over HTTP", http["tokens_s"]))
    print(f"{'share':<24}{result['share']:10.1%}, the bar is {BAR:.0%}")
    for name, times in http["latency_ms"].items():
        print(f"{name.upper():<24}p50 {times['p50']:.2f} ms, p99 {times['p99']:.2f} ms")
    inside = http["engine"]
    print(
        f"events in one read {http['events_per_read']:.2f}; the service's engine: "
        f"{inside['tokens_s_in_steps']:.0f} tokens/s in {inside['steps']:.0f} steps, which are "
        f"{inside['share_of_time_in_steps']:.1%} of the time; late compiles "
        f"{engine['compiles_after_ready']} alone, {inside['late_compiles']:.0f} in the service"
    )
    print("cores in use:", ", ".join(f"{k} {v:.2f}" for k, v in http["cores"].items()))
    phases = result["phases_s"]
    print("seconds:", ", ".join(f"{k} {v:.0f}" for k, v in phases.items()), end="")
    print(f"; {sum(phases.values()):.0f} in all")


def main() -> None:
    args = parse_args()
    device = args.device or ("cpu" if args.tiny else "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        if args.device:
            sys.exit("error: --device cuda, but torch finds no CUDA device")
        print("skipped: this measures a CUDA GPU, and torch finds none; --tiny runs on a CPU")
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        plan = make_plan(args, Path(folder), device)
        free = shutil.disk_usage(folder).free
        if free < plan.disk_bytes:
            sys.exit(
                f"error: {free / 1e9:.0f} GB are free on the disk of {folder}, "
                f"{plan.disk_bytes / 1e9:.0f} are needed: name another folder with --dir, or use "
                "fewer --adapters"
            )
        try:
            result = measure(plan)
        except (RuntimeError, TimeoutError, ClusterError) as error:
            sys.exit(f"error: {type(error).__name__}: {error}")
    show(result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
