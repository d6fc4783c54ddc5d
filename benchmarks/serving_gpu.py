"""Tokens per second of the whole service over HTTP beside those of its engine alone, on one GPU.

    python benchmarks/serving_gpu.py --haproxy --out serving_gpu.json
    python benchmarks/serving_gpu.py --tiny           # a CPU: checks this program, measures nothing

12 layers of Qwen3-30B-A3B with random weights in bf16; 32 adapters of rank 16 on attention and all
experts (423 MB each); 64 requests at once, two per adapter, of 128 random tokens and 256 new ones
at temperature 1. A round is over when the last answer is; the median of the rounds counts. First
the engine alone, in a process of its own with the adapters in its pool, then `loraplex serve` with
the same settings: 8 tenants upload the adapters through the REST API into the store that it starts,
and once all of them are in the pool, the answers are streamed over HTTP, through Ray Serve's own
proxy; with --haproxy then once more, on the same store, through its HAProxy (LORAPLEX_HAPROXY),
unless --limit seconds would be passed. TTFT is the time to the first event, ITL that from one event
to the next (those that come in one piece: 0), TPOT a stream's mean of it.

Other settings of both (`loraplex config` lists them) go behind: `serving_gpu.py -- name=value`. It
writes 50 GB and ends with exit code 1 when an answer fails or has another number of tokens.
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

import httpx
from _device import device_of
from _serving_gpu_client import Adapter
from _serving_gpu_engine import measure_engine
from _serving_gpu_plan import Plan
from _serving_gpu_report import BAR, rates, show
from _serving_gpu_rounds import measure_streams
from _serving_gpu_service import publish, service
from loraplex.cluster.errors import ClusterError

PACKAGES = ("torch", "triton", "ray", "uvicorn", "fastapi")
FAILURES = (RuntimeError, TimeoutError, ClusterError, OSError, httpx.HTTPError)


class Phases:
    """How long each part took, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        print(f"{name} ...", flush=True)
        began, inside = time.monotonic(), sum(self.seconds.values())
        yield
        inside = sum(self.seconds.values()) - inside  # phases within this one
        self.seconds[name] = round(time.monotonic() - began - inside, 1)
        print(f"{name}: {self.seconds[name]:.1f} s", flush=True)

    def has_room_for_another_front(self, limit_s: float) -> bool:
        """It takes what the one before took without the uploads."""
        again = sum(s for name, s in self.seconds.items() if name.startswith("HTTP by"))
        return sum(self.seconds.values()) + again < limit_s


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda, cpu with --tiny")
    parser.add_argument("--haproxy", action="store_true", help="measure through HAProxy as well")
    parser.add_argument("--limit", type=float, default=460, help="seconds for both; default: 460")
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


def over_http(
    plan: Plan, phases: Phases, haproxy: bool, limit_s: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """Starts the service once for each front, the first time to fill its store.

    Returns:
        Figures by front, and why there are none of the front that failed.
    """
    found: dict[str, Any] = {}
    adapters: list[Adapter] = []
    for front in ("Serve's proxy", "HAProxy")[: 1 + haproxy]:
        name = f"HTTP by {front}"
        if found and not phases.has_room_for_another_front(limit_s):
            print(f"left out: {name} would pass --limit {limit_s:.0f}")
            break
        try:
            with phases.phase(f"{name}, start and stop"), service(plan, front == "HAProxy") as up:
                if not adapters:
                    with phases.phase("uploads"):
                        adapters = publish(plan, up)
                with phases.phase(f"{name}, rounds"):
                    found[front] = asyncio.run(measure_streams(plan, up, adapters))
        except FAILURES as error:
            return found, {front: f"{type(error).__name__}: {error}"}
        print(rates(name, found[front]["tokens_s"]), flush=True)
    return found, {}


def measure(plan: Plan, haproxy: bool, limit_s: float) -> dict[str, Any]:
    phases = Phases()
    load = os.getloadavg()[0]
    with phases.phase("files"):
        plan.write_model()
        plan.write_adapter()
    with phases.phase("engine alone"), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        engine = pool.submit(measure_engine, plan).result()
    print(rates("engine alone", engine["tokens_s"]), flush=True)
    http, failed = over_http(plan, phases, haproxy, limit_s)
    alone = statistics.median(engine["tokens_s"])
    for figures in http.values():
        figures["share"] = statistics.median(figures["tokens_s"]) / alone
    return {
        "machine": engine["machine"],
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "cpus": os.cpu_count(),
        "load_average_before": round(load, 2),
        "config": plan.shape.config,
        "streams": plan.streams,
        "adapters": plan.adapters,
        "adapter_bytes": plan.adapter_bytes,
        "prompt_tokens": plan.shape.prompt,
        "new_tokens": plan.tokens,
        "settings": {k: v for k, v in plan.all_settings().items() if k != "model_path"},
        "engine_alone": engine,
        "service": http,
        "failed": failed,
        "bar": BAR,
        "phases_s": phases.seconds,
    }


def main() -> None:
    args = parse_args()
    device = device_of(args)
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
            result = measure(plan, args.haproxy, args.limit)
        except FAILURES as error:
            sys.exit(f"error: {type(error).__name__}: {error}")
    show(result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {args.out}")
    if result["failed"]:
        sys.exit("".join(f"error: HTTP by {k}: {text}" for k, text in result["failed"].items()))


if __name__ == "__main__":
    main()
