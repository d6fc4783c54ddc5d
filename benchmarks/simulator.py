"""The live policy against four others in the simulator, on all published scenarios.

    python benchmarks/simulator.py                 # a few minutes on one core
    python benchmarks/simulator.py --only zipf-1   # prints, writes nothing
    python benchmarks/simulator.py --abuse         # one abusive tenant: what it costs the others

All policies see the same traces. The floor is what must move for anybody, even with all requests
known beforehand (`loraplex.cluster.simulate.floor`). Time to first token and bytes moved (into
pools, from disks and from the object store) are of what comes after each scenario's warm-up. Writes
benchmarks/results/simulator/comparison.json and two SVGs; the same seed gives the same file.

With --abuse: the other tenants' tokens/s and time to first token, without the abuser's requests and
with them, in groups that serve tenants by turns (loraplex) and in those that serve requests as they
come (all others). Writes abuse.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from loraplex.cluster.simulate import (
    ABUSER,
    SCENARIOS,
    Abuse,
    Floor,
    Hardware,
    Summary,
    bars,
    compare,
    compare_abuse,
    floor,
    generate,
)

RESULTS = Path(__file__).resolve().parent / "results" / "simulator"


def show(name: str, rows: list[Summary], least: Floor, seconds: float) -> None:
    print(f"{name}  ({seconds:.0f} s of CPU)")
    print(f"  {'floor':51}  pools {least.gpu_gb:8.1f} GB  disk    0.0  s3 {least.s3_gb:7.1f}")
    for s in rows:
        print(
            f"  {s.policy:9} p50 {s.p50_ttft_s:8.3f}  p99 {s.p99_ttft_s:8.3f} s  "
            f"worst decile {s.slo_worst_decile:6.1%}  pools {s.gpu_gb:8.1f} GB  "
            f"disk {s.disk_gb:6.1f}  s3 {s.s3_gb:7.1f}",
            flush=True,
        )


def abuse(names: list[str], seed: int) -> dict[str, list[Abuse]]:
    """The comparison in these scenarios, printed as it goes."""
    results: dict[str, list[Abuse]] = {}
    for name in names:
        scenario = SCENARIOS[name]
        started = time.process_time()
        trace = generate(scenario.work, seed)
        rows = compare_abuse(trace, ABUSER, scenario.groups, scenario.warmup_s, seed)
        results[name] = rows
        print(f"{name}, the other tenants  ({time.process_time() - started:.0f} s of CPU)")
        for a in rows:
            print(
                f"  {a.policy:13} tokens/s {a.without.tokens_s:7.1f} -> {a.beside.tokens_s:7.1f} "
                f"({a.throughput:6.1%})  p99 {a.without.p99_ttft_s:8.3f} -> "
                f"{a.beside.p99_ttft_s:8.3f} s ({a.p99_times:.2f} times)",
                flush=True,
            )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=list(SCENARIOS), help="one scenario, nothing written")
    parser.add_argument("--abuse", action="store_true", help="the abusive tenant, nothing else")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.abuse:
        names = [n for n in SCENARIOS if n.startswith("abusive") and args.only in (None, n)]
        harm = abuse(names, args.seed)
        if args.only is None:
            report = {
                "seed": args.seed,
                "hardware": asdict(Hardware()),
                "scenarios": {
                    n: {**asdict(SCENARIOS[n]), "results": [asdict(a) for a in rows]}
                    for n, rows in harm.items()
                },
            }
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "abuse.json").write_text(json.dumps(report, indent=1) + "\n")
        return 0
    results: dict[str, list[Summary]] = {}
    floors: dict[str, Floor] = {}
    for name, scenario in SCENARIOS.items():
        if args.only in (None, name):
            started = time.process_time()
            trace = generate(scenario.work, args.seed)
            results[name] = compare(trace, scenario.groups, scenario.warmup_s, args.seed)
            pools = scenario.groups * Hardware().pool_bytes
            floors[name] = floor(trace, pools, scenario.warmup_s)
            show(name, results[name], floors[name], time.process_time() - started)
    if args.only is None:
        args.out.mkdir(parents=True, exist_ok=True)
        report = {
            "seed": args.seed,
            "hardware": asdict(Hardware()),
            "scenarios": {
                name: {
                    **asdict(SCENARIOS[name]),
                    "floor": asdict(floors[name]),
                    "results": [asdict(s) for s in rows],
                }
                for name, rows in results.items()
            },
        }
        (args.out / "comparison.json").write_text(json.dumps(report, indent=1) + "\n")
        ttft = bars(results, "p99_ttft_s", "p99 time to first token, seconds", 0.01)
        (args.out / "ttft.svg").write_text(ttft)
        moved = bars(results, "gpu_gb", "copied into adapter pools, GB", 1.0)
        (args.out / "bytes.svg").write_text(moved)
    return 0


if __name__ == "__main__":
    sys.exit(main())
