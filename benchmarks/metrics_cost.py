"""What metrics cost an engine: time in their code against the time of the steps around it.

    python benchmarks/metrics_cost.py

One run of the demo model's engine with a full batch, a long queue and all adapters. Each call of
the accounting and each report are timed where they happen, so both figures come from the same
steps; timing itself is counted as cost. All is CPU time of one thread, which other processes of the
machine disturb little. A second table has what a gateway does for a token.
A share of the CPU demo's step says little of a GPU's: the microseconds stand beside it, and the
share that they would be of a GPU's step. There the engine's data stays in the caches from step to
step, which a CPU's own steps push it out of; so that share is of calls made right after each other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _local_packs import LocalPacks
from _serving_load import DemoFacts
from loraplex.adapter_store import BaseModel, make_pack
from loraplex.cluster.metrics import EngineMetrics, GatewayMetrics, new_registry
from loraplex.workers import AdapterRef, Engine, EngineConfig, GenerationRequest, SamplingParams
from loraplex.workers.queue_time import SAMPLE_S
from prometheus_client import generate_latest

RUNNING, REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 64, 192, 24, 24
REPORT_EVERY_S = 0.5  # as engine_process.py does
SCRAPE_EVERY_S = 5.0  # deploy/prometheus/prometheus.yml
GPU_STEP_S = 0.006  # decode of 64 sequences of Qwen3-30B-A3B (12 layers) on an H100, FACTS
TOKENS = 20_000
WARM_CALLS = 50


class Stopwatch:
    """Adds up the CPU time of the calls that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - began
                self.calls += 1

        return timed


def make_engine(folder: Path) -> tuple[Engine, list[AdapterRef | None]]:
    demo = DemoFacts.read()
    base = BaseModel.from_folder(demo.model, demo.base_name)
    refs: list[AdapterRef | None] = [None]
    paths: dict[str, Path] = {}
    for name, source in demo.adapters.items():
        path = folder / f"{name}.pack"
        config = (source / "adapter_config.json").read_bytes()
        info = make_pack(config, source / "adapter_model.safetensors", base, path)
        ref = AdapterRef(f"tenant-{name}", info.digest)
        refs.append(ref)
        paths[ref.key] = path
    config = EngineConfig(
        str(demo.model), base_fingerprint=base.fingerprint, max_running=RUNNING, torch_threads=1
    )
    return Engine(config, LocalPacks(paths)), refs


def measure_engine(engine: Engine, refs: list[AdapterRef | None]) -> dict[str, float]:
    """Times in seconds, and how many steps and reports there were."""
    look, launched, report, update, scrape = (Stopwatch() for _ in range(5))
    account = engine._account
    account.look = look.around(account.look)
    plain = account.launched
    timed = launched.around(plain)
    warm: list[float] = []

    def launched_too(plan: Any) -> None:
        timed(plan)
        if not warm and len(plan.work) == RUNNING:
            began = time.thread_time()
            for _ in range(WARM_CALLS):
                plain(plan)
            warm.append((time.thread_time() - began) / WARM_CALLS)

    account.launched = launched_too
    make_report = report.around(lambda: engine.report().to_wire() and engine.report())
    registry = new_registry()
    metrics = EngineMetrics(registry, "g0")
    take = update.around(metrics.update)
    show = scrape.around(lambda: generate_latest(registry))
    rng = random.Random()
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    for i in range(REQUESTS):
        ref = refs[i % len(refs)]
        prompt = tuple(rng.randrange(4, 4000) for _ in range(PROMPT_TOKENS))
        tenant = ref.tenant_id if ref else "tenant-base"
        engine.submit(GenerationRequest(str(i), prompt, params, tenant, ref))
    reported = scraped = time.perf_counter()
    began = time.thread_time()
    while engine.has_work():
        engine.step()
        now = time.perf_counter()
        if now - reported > REPORT_EVERY_S:
            reported = now
            take(make_report())
        if now - scraped > SCRAPE_EVERY_S:
            scraped = now
            show()
    take(make_report())
    show()
    return {
        "cpu_s": time.thread_time() - began,
        "steps": engine.report().steps,
        "look_s": look.seconds / look.calls,
        "launched_s": launched.seconds / launched.calls,
        "warm_s": warm[0],
        # It was made twice: once to travel, once to be read.
        "report_s": report.seconds / 2 / report.calls,
        "update_s": update.seconds / update.calls,
        "scrape_s": scrape.seconds / scrape.calls,
    }


def measure_gateway() -> float:
    """Seconds that a token costs a gateway's metrics."""
    metrics = GatewayMetrics(new_registry())
    began = time.thread_time()
    for _ in range(TOKENS):
        metrics.next_tokens(1, 0.01)
    return (time.thread_time() - began) / TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--machine", default="cpu-2core", help="name of the results folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        engine, refs = make_engine(Path(folder))
        found = measure_engine(engine, refs)
        engine.close()
    step_s = found["cpu_s"] / found["steps"]
    own_s, warm_s = found["launched_s"], found["warm_s"]
    # Reports are made between steps, in the engine's thread; all that follows is elsewhere.
    every_s = found["report_s"] / REPORT_EVERY_S
    share, on_gpu = (
        own / step + found["look_s"] / max(step, SAMPLE_S) + every_s
        for own, step in ((own_s, step_s), (warm_s, GPU_STEP_S))
    )
    gateway_us = measure_gateway() * 1e6
    print(f"steps {found['steps']:.0f}, mean {step_s * 1e3:.2f} ms, at most {RUNNING} sequences")
    print(f"{'in a step, caches full of the model':<42}{own_s * 1e6:8.1f} us")
    print(f"{f'the same, warm, {RUNNING} sequences':<42}{warm_s * 1e6:8.1f} us")
    print(f"{f'a look at the queue, every {SAMPLE_S:g} s':<42}{found['look_s'] * 1e6:8.1f} us")
    print(f"{'a report, every 0.5 s, in the engine':<42}{found['report_s'] * 1e6:8.1f} us")
    print(f"{'taking it over, in the front':<42}{found['update_s'] * 1e6:8.1f} us")
    print(f"{'a scrape, in the front':<42}{found['scrape_s'] * 1e6:8.1f} us")
    print(f"{'a token, in a gateway':<42}{gateway_us:8.1f} us")
    print(f"{'share of the engine time here':<42}{share:8.3%}")
    print(f"{f'share at steps of {GPU_STEP_S * 1e3:g} ms, warm':<42}{on_gpu:8.3%}")
    result = {
        "machine": args.machine,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "cpus": os.cpu_count(),
        "running": RUNNING,
        "requests": REQUESTS,
        "steps": found["steps"],
        "step_us": round(step_s * 1e6, 1),
        "in_step_us": round(own_s * 1e6, 2),
        "in_step_warm_us": round(warm_s * 1e6, 2),
        "look_us": round(found["look_s"] * 1e6, 1),
        "report_us": round(found["report_s"] * 1e6, 1),
        "front_update_us": round(found["update_s"] * 1e6, 1),
        "scrape_us": round(found["scrape_s"] * 1e6, 1),
        "gateway_token_us": round(gateway_us, 2),
        "share": round(share, 5),
        f"share_at_{GPU_STEP_S * 1e3:g}_ms_steps_warm": round(on_gpu, 5),
    }
    path = Path(__file__).parent / "results" / args.machine / "metrics_cost.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
