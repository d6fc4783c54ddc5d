"""Deaths under load: do all answers come, and are they what they would have been?

    python benchmarks/failover.py --fault rank-kill --seconds 300

Starts the demo with several groups, asks every request of a fixed set once and again (answers that
differ end it), and takes the speed of that for the service's capacity. Then requests of the set
arrive at random at `--share` of it, while every `--every` seconds, once two groups serve again, a
process is killed or stopped. Every answer (text, finish reason, usage) is compared with the one
from before. JSON by fault in benchmarks/results/<machine>/failover.json.

Faults: rank-kill (SIGKILL), rank-stop (SIGSTOP), front-kill, controller-kill, gateway-kill. A
gateway takes the connections that it has with it: requests that were open when one died may fail.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from _failover_faults import FAULTS, Death, Operator
from _failover_load import Load, Tally, make_jobs
from _serving_http import service
from _serving_load import DemoFacts

PACKAGES = ("loraplex", "ray", "torch")
JOBS = 40
# A gateway's death: the proxy may still send to it what comes within so long.
NOTICED_S = 1.0
FREED_S = 10.0  # the engines must have nothing open by then


async def storm(args: argparse.Namespace, facts: dict[str, Any], root: psutil.Process) -> dict:
    """One run; what it found."""
    rng = random.Random(args.seed)
    jobs = make_jobs(facts, DemoFacts.read().base_name, JOBS, rng)
    operator = Operator(facts["url"], facts["admin_key"], root)
    deaths: list[asyncio.Task[Death]] = []
    async with Load(facts["url"]) as load:
        await operator.wait_serving(args.groups)
        expected, _ = await load.answers(jobs)
        again, capacity = await load.answers(jobs)
        if again != expected:
            sys.exit("error: answers differ without any fault")
        stop = asyncio.Event()
        running = asyncio.create_task(load.run(jobs, expected, args.share * capacity, stop, rng))
        ends = time.monotonic() + args.seconds
        try:
            while (pause := ends - time.monotonic()) > 0:
                await asyncio.sleep(min(args.every, pause))
                await operator.wait_serving(min(2, args.groups))
                if time.monotonic() < ends:
                    harm = operator.harm(args.fault, args.groups, rng)
                    deaths.append(asyncio.create_task(harm))
        finally:
            stop.set()
            tally = await running
        freed_s = await _freed(operator)
        ended = await asyncio.gather(*deaths)
    await operator.close()
    return _figures(args, capacity, ended, tally, freed_s)


async def _freed(operator: Operator) -> float | None:
    """Seconds until no engine has anything open; None: it took more than FREED_S."""
    began = time.monotonic()
    while time.monotonic() < began + FREED_S:
        view = await operator.view()
        if view is not None and not view.open_requests:
            return round(time.monotonic() - began, 2)
        await asyncio.sleep(0.1)
    return None


def _figures(
    args: argparse.Namespace,
    capacity: float,
    deaths: list[Death],
    tally: Tally,
    freed_s: float | None,
) -> dict[str, Any]:
    counts = tally.count()
    broken = 0
    if args.fault == "gateway-kill":
        broken = sum(
            o.verdict == "failed"
            and any(o.began < d.at + NOTICED_S and o.ended > d.at for d in deaths)
            for o in tally.outcomes
        )

    def worst(name: str) -> float | None:
        times = [t for d in deaths if (t := getattr(d, name)) is not None]
        return round(max(times), 2) if times else None

    in_flight = [sum(o.began < d.at < o.ended for o in tally.outcomes) for d in deaths]
    return {
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "groups": args.groups,
        "gateways": args.gateways,
        "seconds": args.seconds,
        "requests_per_s": round(args.share * capacity, 2),
        "share_of_capacity": args.share,
        "responses": len(tally.outcomes),
        "equal": counts.get("equal", 0),
        "altered": counts.get("altered", 0),
        "failed": counts.get("failed", 0) - broken,
        "broken_with_their_gateway": broken,
        "kills": len(deaths),
        "open_at_kills": sum(in_flight),
        "slowest_s": round(tally.slowest_s(), 2),
        "seen_s_max": worst("seen_s"),
        "gone_s_max": worst("gone_s"),
        "ready_s_max": worst("ready_s"),
        "engines_empty_s": freed_s,
        "deaths": [d.to_json() for d in deaths],
        "examples": tally.examples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--machine", default="cpu-2core", help="name of the results folder")
    parser.add_argument("--out", type=Path, help="JSON file; default: in the results folder")
    parser.add_argument("--fault", choices=sorted(FAULTS), default="rank-kill")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--gateways", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two deaths")
    parser.add_argument("--share", type=float, default=0.3, help="load, of the capacity")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    os.environ["LORAPLEX_GATEWAY_REPLICAS"] = str(args.gateways)
    with service(["--groups", str(args.groups)]) as facts:
        [root] = [c for c in psutil.Process().children() if "up" in c.cmdline()]
        figures = asyncio.run(storm(args, facts, root))
    shown = {k: v for k, v in figures.items() if k not in ("deaths", "versions")}
    print(json.dumps(shown, indent=1))
    path = args.out or Path(__file__).parent / "results" / args.machine / "failover.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {args.fault: figures}, indent=1) + "\n")
    print(f"written to {path}")
    bad = figures["altered"] + figures["failed"]
    sys.exit(f"error: {bad} answers failed or were altered" if bad else 0)


if __name__ == "__main__":
    main()
