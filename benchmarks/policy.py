"""Time of one choice of a group, and of one plan, on one core.

    python benchmarks/policy.py

`choose`: 64 groups, an adapter on four of them and a prompt of 1,024 tokens, whose prefix is
looked up in the gateway's record; four cases: a placed group will do, all placed ones are
overloaded, four tenants flood every group, nothing is placed. Hashing the prompt into blocks is
shown apart: it happens once a request. `plan`: 10,000 adapters with Zipf's popularity on 256
groups, from empty pools, then in steady state with demand that varies by 10 %, then after the
popularity was reversed. Process time,
best of several; JSON in benchmarks/results/<machine>/policy.json.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from loraplex.cluster.control import GroupEntry, PlacementConfig, Plan, RoutingTable, plan
from loraplex.cluster.prefix_record import PrefixRecord
from loraplex.cluster.routing import Ask, GroupLoad, choose
from loraplex.workers import EngineReport, GroupReport

ROOT = Path(__file__).resolve().parent
GROUPS, CALLS, ROUNDS = 64, 2000, 7
POOL_BYTES = 28 * 10**9
RANK_BYTES = 105_906_176  # of rank 1 in 1.69 GB of rank 16


def best_us(call: Callable[[int], object]) -> float:
    """Microseconds of one call, the best of several rounds."""
    times = []
    for _ in range(ROUNDS):
        started = time.process_time()
        for i in range(CALLS):
            call(i)
        times.append((time.process_time() - started) / CALLS)
    return round(min(times) * 1e6, 2)


def measure_choose(rng: random.Random) -> dict[str, float]:
    names = [f"group-{rng.getrandbits(40):x}" for _ in range(GROUPS)]
    keys = [f"tenant/{rng.getrandbits(256):064x}" for _ in range(200)]
    entries = tuple(GroupEntry("d", n, "h", 1) for n in names)
    placed = {key: tuple(rng.sample(names, 4)) for key in keys}
    near = {key: tuple(rng.sample(names, 2)) for key in keys}
    table = RoutingTable(1, 1, entries, placed, near, dict.fromkeys(keys, 10**9))
    cold = RoutingTable(1, 1, entries, {}, {}, {})
    loads = {n: GroupLoad(rng.randrange(20), wait_s=rng.random() / 50, token_s=2e-5) for n in names}
    busy = {
        key: {
            n: GroupLoad(500, wait_s=9.0, token_s=2e-5) if n in placed[key] else loads[n]
            for n in names
        }
        for key in keys
    }
    floods = {f"flood{i}": (100.0, 5.0) for i in range(4)}
    flooded = {n: GroupLoad(420, 9.0, rng.random() / 50, 2e-5, floods=floods) for n in names}
    record = PrefixRecord()
    prompts = [[rng.randrange(50_000) for _ in range(1024)] for _ in keys]
    blocks = [record.blocks(key, p) for key, p in zip(keys, prompts, strict=True)]
    for key, found in zip(keys, blocks, strict=True):
        record.note(found, rng.choice(placed[key]))

    def ask(i: int) -> Ask:
        k = i % len(keys)
        return Ask(keys[k], i * 0x9E3779B97F4A7C15 % 2**64, 1024, record.cached(blocks[k]))

    return {
        "placed_us": best_us(lambda i: choose(table, ask(i), loads)),
        "spill_us": best_us(lambda i: choose(table, ask(i), busy[keys[i % len(keys)]])),
        "flooded_us": best_us(lambda i: choose(table, ask(i), flooded)),
        "cold_us": best_us(lambda i: choose(cold, ask(i), loads)),
        "base_us": best_us(lambda i: choose(table, Ask(None, i, 1024), loads)),
        "hash_1024_tokens_us": best_us(lambda i: record.blocks("t/a", prompts[i % len(keys)])),
    }


def measure_plan(rng: random.Random, adapters: int, groups: int) -> dict[str, float]:
    keys = [f"tenant{i % 500}/{rng.getrandbits(256):064x}" for i in range(adapters)]
    sizes = {k: rng.choice([8, 16, 32]) * RANK_BYTES for k in keys}
    demand = {k: 2000 / (i + 1) for i, k in enumerate(keys)}
    config = PlacementConfig(move_bytes_per_tick=10**14, host_bytes_per_tick=10**12)
    pools: dict[str, dict[str, int]] = {f"g{i:03d}": {} for i in range(groups)}
    host: dict[str, dict[str, int]] = {name: {} for name in pools}
    state = Plan(sizes=sizes)

    def tick(demand: dict[str, float]) -> float:
        nonlocal state
        reports = [
            GroupReport(
                "d",
                name,
                name,
                1,
                2,
                False,
                EngineReport(
                    running=20,
                    max_running=64,
                    pool_bytes_total=POOL_BYTES,
                    host_bytes_total=8 * POOL_BYTES,
                    gpu=dict(pools[name]),
                    host=dict(host[name]),
                ),
            )
            for name in pools
        ]
        started = time.process_time()
        state = plan(reports, demand, state, config)
        seconds = time.process_time() - started
        for name in pools:
            pools[name] = {k: sizes[k] for k in state.desired[name]}
            host[name] = {k: sizes[k] for k in state.host[name]}
        return seconds

    first = tick(demand)
    steady = [tick({k: v * rng.uniform(0.9, 1.1) for k, v in demand.items()}) for _ in range(5)]
    turned = dict(zip(keys, reversed(demand.values()), strict=True))
    upheaval = tick(turned)
    return {
        "from_empty_s": round(first, 3),
        "steady_s": round(sorted(steady)[len(steady) // 2], 3),
        "reversed_s": round(upheaval, 3),
        "copies": sum(len(k) for k in state.desired.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--machine", default="cpu-2core")
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--groups", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rng = random.Random(7)
    report: dict[str, Any] = {
        "machine": args.machine,
        "date": date.today().isoformat(),
        "choose": {"groups": GROUPS, **measure_choose(rng)},
        "plan": {
            "adapters": args.adapters,
            "groups": args.groups,
            **measure_plan(rng, args.adapters, args.groups),
        },
    }
    print(json.dumps(report, indent=1))
    out = args.out or ROOT / "results" / args.machine / "policy.json"
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
