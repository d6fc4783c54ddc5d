"""Time to first token of a live system of four groups, beside what the simulator says of it.

    python benchmarks/simulator_live.py

Starts `loraplex up` with four groups on this machine's cores, whose pools don't hold all adapters.
A calibration on requests and adapters of its own gives the simulator its constants: seconds of
steps by rows, of loads by tier, of a request outside its group, and how much groups slow each
other down. Then generated traces, fresh ones each with fresh adapters, run live, at a share of the
requests that the same kind of load came to without pauses; and in the simulator, with the arrival
times that were recorded. The simulator never sees a trace's answers. Writes
benchmarks/results/simulator/live.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

from _live_calibration import Calibration, prompt
from _live_client import Adapter, Answer, Client
from _serving_http import service
from _serving_load import DemoFacts
from loraplex.cluster.control import ControllerConfig
from loraplex.cluster.simulate import (
    Hardware,
    Loraplex,
    Trace,
    TracedAdapter,
    TracedRequest,
    Workload,
    generate,
    simulate,
)
from loraplex.cluster.simulate.summary import quantile

RESULT = Path(__file__).resolve().parent / "results" / "simulator" / "live.json"
GROUPS, TENANTS = 4, 4
POOL_BYTES = 8_000_000  # about 3.5 of the demo's adapters
CLIENTS = 12  # of the measurement of what the machine can do
WORK = Workload(
    "live",
    adapters=16,
    rate=0.0,
    duration_s=0.0,
    tenants=TENANTS,
    prompt_tokens=96,
    output_tokens=16,
    prefixes=2,
    prefix_tokens=32,
)


def prompt_of(request: TracedRequest, rng: random.Random) -> list[int]:
    shared = random.Random(f"{request.adapter}/{request.prefix}")
    return prompt(shared, request.prefix_tokens) + prompt(
        rng, request.prompt_tokens - request.prefix_tokens
    )


def capacity(client: Client, adapters: list[Adapter], seconds: float, seed: int) -> float:
    """Requests/s that clients get which ask again at once."""
    trace = generate(replace(WORK, rate=200.0, duration_s=seconds), seed)
    live = dict(zip((a.key for a in trace.adapters), adapters, strict=True))
    rng, waiting, done = random.Random(seed), list(trace.requests), 0
    rng.shuffle(waiting)

    async def one(until: float) -> None:
        nonlocal done
        while time.perf_counter() < until:
            r = waiting.pop()
            assert r.adapter is not None
            await client.ask(live[r.adapter], prompt_of(r, rng), r.output_tokens)
            done += 1

    async def everyone() -> None:
        until = time.perf_counter() + seconds
        await asyncio.gather(*(one(until) for _ in range(CLIENTS)))

    began = time.perf_counter()
    asyncio.run(everyone())
    return done / (time.perf_counter() - began)


def replay(client: Client, trace: Trace, live: dict[str, Adapter], seed: int) -> list[Answer]:
    """The answers in the trace's order."""
    rng = random.Random(seed)
    prompts = [prompt_of(r, rng) for r in trace.requests]

    async def one(r: TracedRequest, tokens: list[int], began: float) -> Answer:
        assert r.adapter is not None
        await asyncio.sleep(began + r.at_s - time.perf_counter())
        answer = await client.ask(live[r.adapter], tokens, r.output_tokens)
        return replace(answer, sent=answer.sent - began)

    async def everyone() -> list[Answer]:
        began = time.perf_counter()
        return await asyncio.gather(
            *(one(r, p, began) for r, p in zip(trace.requests, prompts, strict=True))
        )

    return asyncio.run(everyone())


def recorded(
    trace: Trace, answers: list[Answer], live: dict[str, Adapter], sizes: dict[str, int]
) -> Trace:
    """The trace as it was sent: times, and adapters by their live keys and sizes."""
    requests = [
        replace(r, at_s=a.sent, adapter=live[r.adapter].key)
        for r, a in zip(trace.requests, answers, strict=True)
        if r.adapter is not None
    ]
    adapters = tuple(TracedAdapter(a.key, sizes[a.model]) for a in live.values())
    return Trace(adapters, tuple(sorted(requests, key=lambda r: r.at_s)))


def figures(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {"p50_s": round(quantile(ordered, 0.5), 4), "p99_s": round(quantile(ordered, 0.99), 4)}


def compare(live: list[float], simulated: list[float]) -> dict[str, Any]:
    one, other = figures(live), figures(simulated)
    ratio = {name[:3]: round(other[name] / one[name], 3) for name in one}
    print(f"  live {one}  simulator {other}  simulator/live {ratio}", flush=True)
    return {"requests": len(live), "live": one, "simulator": other, "ratio": ratio}


def simulated(trace: Trace, hardware: Hardware) -> tuple[list[float], dict[str, int]]:
    policy = Loraplex(ControllerConfig(settle_s=0.0))
    outcome = simulate(trace, policy, GROUPS, hardware)
    return [s.ttft_s for s in outcome.served], dict(outcome.loads)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the traces")
    parser.add_argument("--traces", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=35.0, help="of each trace")
    parser.add_argument("--share", type=float, default=0.4, help="of what the machine can do")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    os.environ["LORAPLEX_POOL_BYTES"] = str(POOL_BYTES)
    demo, load = DemoFacts.read(), os.getloadavg()[0]
    runs: list[tuple[Trace, list[Answer]]] = []
    with service(["--groups", str(GROUPS)]) as facts:
        client = Client(facts)
        with client.published("calibration", demo.adapters, TENANTS) as adapters:
            calibration = Calibration(client, adapters, args.seed)
            by_key: dict[str, int] = {}
            hardware = calibration.hardware(by_key)
            most = capacity(client, adapters, 10.0, args.seed)
            sizes = {a.model: by_key[a.key] for a in adapters if a.key in by_key}
        rate = args.share * most
        print(f"{most:.1f} requests/s without pauses, {rate:.1f} from here on", flush=True)
        print(hardware, calibration.figures, flush=True)
        for number in range(args.traces):
            work = replace(WORK, rate=rate, duration_s=args.seconds)
            trace = generate(work, args.seed + number)
            with client.published(f"trace-{number}", demo.adapters, TENANTS) as adapters:
                live = dict(zip((a.key for a in trace.adapters), adapters, strict=True))
                answers = replay(client, trace, live, args.seed + number)
            runs.append((recorded(trace, answers, live, sizes), answers))
    load_after = os.getloadavg()[0]
    results, everything, predicted = [], [], []
    for trace, answers in runs:
        times, loads = simulated(trace, hardware)
        row = compare([a.ttft_s for a in answers], times)
        tiers = [a.tier for a in answers]
        row["live_first_tokens_by_tier"] = {t: tiers.count(t) for t in sorted(set(tiers))}
        row["simulator_loads"] = loads
        results.append(row)
        everything += [a.ttft_s for a in answers]
        predicted += times
    print("all traces together")
    report = {
        "date": date.today().isoformat(),
        "cpus": os.cpu_count(),
        "load_average": [round(load, 2), round(load_after, 2)],
        "seed": args.seed,
        "groups": GROUPS,
        "most_requests_s": round(most, 2),
        "rate": round(rate, 2),
        "hardware": asdict(hardware),
        "calibration": calibration.figures,
        "traces": results,
        "together": compare(everything, predicted),
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
