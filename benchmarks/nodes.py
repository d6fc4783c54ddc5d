"""Nodes that die, groups that come and go, updates: all under load, on several Ray nodes.

    python benchmarks/nodes.py --fault node-kill

Starts the demo on Ray nodes of this machine as deploy/kuberay has it: the head with the controller
and a gateway, a node with another gateway, and nodes for groups. Requests of a fixed set, whose
answers don't depend on the batch, are asked again and again, and each answer (text, finish reason,
usage) is compared with the one from before.

Faults: node-kill (all processes of a node with groups), node-stop (the same with SIGSTOP, until its
groups are back elsewhere), scale (1 to 4 groups and back, by the load), update (another setting is
deployed). JSON by fault in benchmarks/results/<machine>/nodes.json.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _failover_load import Load, make_jobs
from _failover_watch import EMPTY_S, Watch, conclude
from _nodes_cluster import GATEWAYS, Nodes, nodes_service
from _nodes_runs import Run, node_deaths, scaling, updates
from _serving_load import DemoFacts

PACKAGES = ("loraplex", "ray", "torch")
FAULTS = ("node-kill", "node-stop", "scale", "update")
JOBS = 20
SLOTS = 2  # groups of one node

FEW, MANY = 1, 16  # clients, for one group and for more than three: a group decodes MAX_RUNNING
MAX_RUNNING = 4


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    if args.fault != "scale":
        return {"groups": args.groups, "drain_s": 60}
    return {
        "groups": 1,
        "max_groups": args.groups,
        "max_running": MAX_RUNNING,
        "target_wait_s": 0.2,
        "scale_up_after_s": 2,
        "scale_down_after_s": 5,
        "drain_s": 60,
    }


async def storm(args: argparse.Namespace, nodes: Nodes, facts: dict[str, Any]) -> dict[str, Any]:
    """One run; what it found."""
    rng = random.Random(args.seed)
    jobs = make_jobs(facts, DemoFacts.read().base_name, args.jobs, rng)
    watch = Watch(facts["url"], facts["admin_key"])
    watching = asyncio.create_task(watch.watch())
    groups = 1 if args.fault == "scale" else args.groups
    async with Load(facts["url"]) as load:
        await watch.wait_serving(groups)
        firm, expected, _ = await load.firm_answers(jobs)
        run = Run(nodes, facts, watch, load, groups, firm, expected, rng)
        if args.fault == "scale":
            found = await scaling(run, FEW, MANY, args.groups, args.rounds)
        elif args.fault == "update":
            found = await updates(run, args.clients, args.rounds)
        else:
            hangs = args.fault == "node-stop"
            found = await node_deaths(run, args.clients, args.rounds, args.every, hangs)
    emptied_s = await watch.wait_empty(EMPTY_S)
    watching.cancel()
    await watch.close()
    counts = run.tally.count()
    return {
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "nodes": 2 + args.nodes,
        "groups": args.groups,
        "gateways": GATEWAYS,
        "requests": len(firm),
        "left_out": len(jobs) - len(firm),
        "responses": len(run.tally.outcomes),
        "equal": counts.get("equal", 0),
        "altered": counts.get("altered", 0),
        "failed": counts.get("failed", 0),
        "slowest_s": round(run.tally.slowest_s(), 2),
        **found,
        "engines_empty_s": None if emptied_s is None else round(emptied_s, 2),
        "examples": run.tally.examples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--machine", default="cpu-2core", help="name of the results folder")
    parser.add_argument("--out", type=Path, help="JSON file; default: in the results folder")
    parser.add_argument("--fault", choices=FAULTS, default="node-kill")
    parser.add_argument("--groups", type=int, default=4, help="scale: the most")
    parser.add_argument("--nodes", type=int, default=3, help=f"for {SLOTS} groups each")
    parser.add_argument("--rounds", type=int, default=2, help="deaths, or times up and down")
    parser.add_argument("--every", type=float, default=10.0, help="seconds of rest between deaths")
    parser.add_argument("--clients", type=int, default=3, help="who ask all the time; not scale")
    parser.add_argument("--jobs", type=int, default=JOBS, help="different requests")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with nodes_service(args.nodes, SLOTS, **settings_of(args)) as (nodes, facts):
        figures = asyncio.run(storm(args, nodes, facts))
    path = args.out or Path(__file__).parent / "results" / args.machine / "nodes.json"
    conclude(path, args.fault, figures)


if __name__ == "__main__":
    main()
