"""Deaths under load: do all answers come, and are they what they would have been?

    python benchmarks/failover.py --fault rank-kill --seconds 300

Starts the demo with several groups, asks every request of a fixed set, alone and beside others, and
takes the speed of all at once for the service's capacity. A request whose answers differ already
then is left out: a sum in float32 depends on the batch in its last bit, and one draw in 10^5 is so
close to the border between two tokens that this decides it. Then requests of the set
arrive at random at `--share` of it, while every `--every` seconds, once two groups serve, a process
is killed or stopped. Every answer (text, finish reason, usage) is compared with the one
from before. JSON by fault in benchmarks/results/<machine>/failover.json.

Faults: rank-kill (SIGKILL), rank-stop (SIGSTOP), front-kill, controller-kill, gateway-kill. A
gateway takes the connections that it has with it: requests that were open when one died may fail.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import statistics
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from _failover_faults import FAULTS, Operator
from _failover_load import Load, Tally, make_jobs
from _failover_watch import EMPTY_S, conclude
from _serving_http import service
from _serving_load import DemoFacts

PACKAGES = ("loraplex", "ray", "torch")
JOBS = 40
# A gateway's death: the proxy may still send to it what comes within so long.
NOTICED_S = 1.0


async def storm(
    args: argparse.Namespace, facts: dict[str, Any], root: psutil.Process
) -> dict[str, Any]:
    """One run; what it found."""
    rng = random.Random(args.seed)
    jobs = make_jobs(facts, DemoFacts.read().base_name, JOBS, rng)
    operator = Operator(facts["url"], facts["admin_key"], root, args.fault)
    watching = asyncio.create_task(operator.watch())
    async with Load(facts["url"]) as load:
        await operator.wait_serving(args.groups)
        firm, expected, capacity = await load.firm_answers(jobs)
        left_out = len(jobs) - len(firm)
        stop = asyncio.Event()
        running = asyncio.create_task(load.run(firm, expected, args.share * capacity, stop, rng))
        ends = time.monotonic() + args.seconds
        while (pause := ends - time.monotonic()) > 0:
            await asyncio.sleep(min(args.every, pause))
            if await operator.wait_serving(min(2, args.groups)) and time.monotonic() < ends:
                operator.harm(rng)
        stop.set()
        tally = await running
    emptied_s = await operator.wait_empty(EMPTY_S)
    await operator.wait_serving(args.groups)
    watching.cancel()
    await operator.close()
    figures = _figures(args, capacity, operator, tally, emptied_s)
    return figures | {"requests": len(firm), "left_out": left_out}


def _figures(
    args: argparse.Namespace,
    capacity: float,
    operator: Operator,
    tally: Tally,
    emptied_s: float | None,
) -> dict[str, Any]:
    counts, times, deaths = tally.count(), operator.times(), operator.deaths
    broken = 0
    if args.fault == "gateway-kill":
        broken = sum(
            o.verdict == "failed"
            and any(o.began < d.at + NOTICED_S and o.ended > d.at for d in deaths)
            for o in tally.outcomes
        )

    def spread(name: str) -> dict[str, float] | None:
        known = [t for x in times if (t := getattr(x, name)) is not None]
        if not known:
            return None
        return {"median": statistics.median(known), "max": max(known), "of": len(known)}

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
        "open_at_kills": sum(o.began < d.at < o.ended for o in tally.outcomes for d in deaths),
        "slowest_s": round(tally.slowest_s(), 2),
        "gone_s": spread("gone_s"),
        "seen_s": spread("seen_s"),
        "ready_s": spread("ready_s"),
        "engines_empty_s": None if emptied_s is None else round(emptied_s, 2),
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
    path = args.out or Path(__file__).parent / "results" / args.machine / "failover.json"
    conclude(path, args.fault, figures)


if __name__ == "__main__":
    main()
