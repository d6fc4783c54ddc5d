"""Minutes of load while adapters come and go: no error, no growth, and counts that agree.

    python benchmarks/soak.py --seconds 600

Starts the demo with two gateways and two groups, whose pools don't hold all adapters. `--streams`
streams are open all the time, over the base model, the demo's adapters and one whose version
changes. Every `--every` seconds its tenant uploads a version or another adapter, rolls back,
deletes, or is refused, and asks whether it shows. Another tenant asks for more than its limit
allows, and waits as Retry-After tells it. In the end every count that the metrics and the client
both have must be the same, and no process may have grown after the first third by more than
GROWTH_MB (STORE_GROWTH_MB). The client's times
contain its own wait for a core. JSON in benchmarks/results/<machine>/soak.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil
from _serving_http import service
from _serving_load import DemoFacts
from _soak_client import Asker, Client
from _soak_keeper import MOVING, PROMPT, PROMPT_TOKENS, Keeper
from _soak_ledger import Scrape, compare, early
from _soak_memory import Memory

PACKAGES = ("loraplex", "ray", "torch", "prometheus-client")
POOL_BYTES = 4_600_000  # two don't hold the four adapters
HOST_BYTES = 16_000_000  # full after a few uploads: a cache that fills is no leak
GATEWAYS, GROUPS = 2, 2
METERED_PER_MINUTE, METERED_STREAMS = 30, 4
LOOK_S = 10.0
SETTLE_S = (
    30.0  # gateways drop a deleted adapter's series within 5 s, and count a stream's end late
)
# Over the last two thirds. Ten minutes moved ranks by 11 and 12 MB and gateways by 5 and 10,
# most of it tens of MB up and down between two looks.
GROWTH_MB = 16.0
# Go lets a heap double before it collects: the store went from 189 to 264 MB and back to 220.
STORE_GROWTH_MB = 64.0
STORE = "object store (weed)"


class Admin:
    """What the operator does."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self._http = httpx.Client(
            base_url=facts["url"],
            headers={"authorization": f"Bearer {facts['admin_key']}"},
            timeout=60.0,
            trust_env=False,
        )

    def tenant(self, name: str, **limits: int) -> str:
        """A new tenant's key."""
        made = self._http.post("/admin/v1/tenants", json={"name": name, "limits": limits})
        path = f"/admin/v1/tenants/{made.raise_for_status().json()['id']}/keys"
        return self._http.post(path, json={}).raise_for_status().json()["key"]

    def scrape(self) -> Scrape:
        """All processes' metrics, merged by the controller."""
        placement = self._http.get("/admin/v1/placement").raise_for_status().json()
        url = f"http://127.0.0.1:{placement['metrics_port']}/metrics"
        return Scrape(httpx.get(url, trust_env=False, timeout=30.0).raise_for_status().text)


async def soak(
    args: argparse.Namespace, facts: dict[str, Any], root: psutil.Process
) -> dict[str, Any]:
    """One run; what it found."""
    demo, admin = DemoFacts.read(), Admin(facts)
    keys = {"keeper": admin.tenant("keeper")}
    keys["metered"] = admin.tenant("metered", requests_per_minute=METERED_PER_MINUTE)
    askers = [Asker(t["name"], t["key"], a, a) for t in facts["tenants"] for a in t["adapters"]]
    before = admin.scrape()
    client = Client(facts["url"], args.streams + METERED_STREAMS + 4)
    styles = {a.model: await client.text(a, PROMPT, PROMPT_TOKENS) or "" for a in askers}
    askers += [Asker(t["name"], t["key"], demo.base_name, "base") for t in facts["tenants"]]
    askers.append(Asker("keeper", keys["keeper"], MOVING, MOVING))
    metered = [Asker("metered", keys["metered"], demo.base_name, "base", METERED_PER_MINUTE)]
    keeper = Keeper(client, "keeper", keys["keeper"], demo.adapters, styles)
    memory = Memory(root)
    await keeper.publish_moving()
    began = time.monotonic()

    def running() -> bool:
        return time.monotonic() < began + args.seconds

    async def look() -> None:
        while running():
            memory.look()
            await asyncio.sleep(LOOK_S)

    def streams(count: int, of: list[Asker], seed: int) -> list[Any]:
        return [client.stream_on(of, running, random.Random(f"{seed} {i}")) for i in range(count)]

    await asyncio.gather(
        keeper.keep_changing(running, args.every),
        look(),
        *streams(args.streams, askers, args.seed),
        *streams(METERED_STREAMS, metered, args.seed + 1),
    )
    seconds = time.monotonic() - began
    ends = time.monotonic() + SETTLE_S
    checks = compare(before, after := admin.scrape(), client.ledger)
    while any(c.differences for c in checks) and time.monotonic() < ends:
        await asyncio.sleep(1.0)
        checks = compare(before, after := admin.scrape(), client.ledger)
    await client.close()
    ledger = client.ledger
    firsts = [s for of in ledger.first_s.values() for s in of]

    def mean(name: str, count: int) -> float:
        return round((after.total(name) - before.total(name)) / count, 3)

    return {
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "gateways": GATEWAYS,
        "groups": GROUPS,
        "streams": args.streams,
        "seconds": round(seconds, 1),
        "answers": sum(ledger.generations.values()),
        "output_tokens": sum(ledger.outputs.values()),
        "changes": keeper.done,
        "refused": client.refusals,
        "errors": len(client.errors),
        "examples": client.errors[:10],
        "compared": {
            c.name: {
                "values": len(c.client.keys() | c.metric.keys()),
                "sum": sum(c.client.values()),
            }
            for c in checks
        },
        "differences": {c.name: c.differences for c in checks if c.differences},
        "early": early(before, after, firsts),
        "first_token_s": {
            "client_mean": round(statistics.mean(firsts), 3),
            "gateway_mean": mean("loraplex_gateway_time_to_first_token_seconds_sum", len(firsts)),
        },
        "memory": _memory_figures(memory),
        "came_or_went": memory.passing(),
    }


def _memory_figures(memory: Memory) -> list[dict[str, Any]]:
    """By process, largest first: PSS by minute and growth after the first third, MB."""
    per_minute = round(60 / LOOK_S)
    return [
        {
            "process": usage.kind,
            "pss_mb": [round(v / 1e6, 1) for v in usage.pss[::per_minute]],
            "rss_mb": [round(v / 1e6, 1) for v in usage.rss[::per_minute]],
            "growth_mb": round(usage.growth / 1e6, 2),
        }
        for usage in sorted(memory.throughout(), key=lambda u: -u.pss[-1])
    ]


def wrong(figures: dict[str, Any]) -> list[str]:
    """What must not be, in words."""
    found = []
    if figures["errors"]:
        found.append(f"{figures['errors']} errors, such as {figures['examples'][0]}")
    for name, values in figures["differences"].items():
        found.append(f"{name} (client, metric): {values}")
    if figures["early"]:
        found.append(f"times to the first token that the client can't have: {figures['early']}")
    for usage in figures["memory"]:
        if usage["growth_mb"] > (STORE_GROWTH_MB if usage["process"] == STORE else GROWTH_MB):
            found.append(f"{usage['process']} grew by {usage['growth_mb']} MB")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--machine", default="cpu-2core", help="name of the results folder")
    parser.add_argument("--out", type=Path, help="JSON file; default: in the results folder")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--streams", type=int, default=100, help="open at a time")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two changes")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    os.environ["LORAPLEX_POOL_BYTES"] = str(POOL_BYTES)
    os.environ["LORAPLEX_HOST_CACHE_BYTES"] = str(HOST_BYTES)
    os.environ["LORAPLEX_GATEWAY_REPLICAS"] = str(GATEWAYS)
    with service(["--groups", str(GROUPS)]) as facts:
        [root] = [c for c in psutil.Process().children() if "up" in c.cmdline()]
        figures = asyncio.run(soak(args, facts, root))
    print(json.dumps(figures, indent=1))
    path = args.out or Path(__file__).parent / "results" / args.machine / "soak.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"written to {path}")
    if found := wrong(figures):
        sys.exit("error: " + "\n".join(found))


if __name__ == "__main__":
    main()
