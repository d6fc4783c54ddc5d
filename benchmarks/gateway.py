"""The gateway beside a bare Ray Serve app, and its connection to a group beside a handle hop.

    python benchmarks/gateway.py

One Serve instance runs both systems behind one proxy:
  - Loraplex: the real gateway (keys, names, limits, tokenizer, SSE) over a real connection to a
    group whose engine is a stand-in: no model, tokens as fast as they are asked for.
  - the bare app: an ingress deployment that streams what a handle to a second deployment yields,
    ready-made chunks of the same size and number. It checks, counts and tokenizes nothing.
The same client sends both the same streams, in turns. "Per core" divides by the processor time of
what stands before the hop (proxy and gateway, or proxy and ingress), so neither the client nor
other work on the machine counts; the time spent behind the hop is given beside it.

The hop alone is measured in a replica that calls both: a stream over a handle, and the gateway's
dispatcher over its connection.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from _gateway_client import Target, ask, sample
from _gateway_rounds import Comparison, Load, System
from _gateway_service import Service, service

PACKAGES = ("loraplex", "ray", "uvicorn", "starlette", "fastapi", "uvloop")
PROMPT = (
    "In the beginning the captain came up on the deck and looked over the sea, and the men said "
    "that the wind would turn before the night."
)
STEP_US = 20_000
STREAMS = (
    Load("32 streams, no pause", "tokens", 32, 1, 128),
    Load(f"32 streams, {STEP_US // 1000} ms a step", "tokens", 32, 1, 100, STEP_US),
)
LOADS = (
    Load("1 at a time, 1 token", "requests", 1, 60, 1),
    Load("16 at once, 1 token", "requests", 16, 15, 1),
    *STREAMS,
)


async def over_http(service: Service) -> tuple[System, System]:
    """The gateway and the bare app, which is started here with chunks like the gateway's."""
    from _gateway_deploy import BARE_PATH, start_bare  # imports Ray: it must run already

    url = urlsplit(service.url)
    host, port = str(url.hostname), url.port or 80
    fixed = {"model": service.adapter, "prompt": PROMPT, "stream": True, "ignore_eos": True}
    body = json.dumps(fixed)[:-1] + ', "max_tokens": %(tokens)d, "seed": %(pace_us)d}'
    ours = Target(host, port, "/v1/completions", service.key, body)
    lines = (await sample(ours, 3)).decode().splitlines()
    chunks = [line for line in lines if line.startswith("data: {")]
    start_bare(chunks[1] + "\n\n")
    bare = Target(host, port, BARE_PATH, service.key, body)

    def system(name: str, target: Target, near: str, *far: str) -> System:
        async def call(load: Load) -> tuple[list[float], list[float]]:
            answers = await ask(target, load.at_once, load.calls, load.tokens, load.pace_us)
            return [a.whole_s for a in answers], [a.first_s for a in answers]

        return System(name, call, ("ProxyActor", near), far)

    return (
        system("Loraplex", ours, "Gateway", "WorkerGroup", "RankActor"),
        system("bare Serve app", bare, "Ingress", "Streamer"),
    )


def hops() -> tuple[System, System]:
    """The connection and the handle, out of one replica."""
    from _gateway_deploy import probe

    def system(way: str, *far: str) -> System:
        async def call(load: Load) -> tuple[list[float], list[float]]:
            return await probe(way, load.at_once, load.calls, load.tokens, load.pace_us)

        return System(way, call, ("HopProbe",), far)

    return system("connection", "WorkerGroup", "RankActor"), system("handle", "ProbeStreamer")


async def compare(service: Service, rounds: int) -> tuple[Comparison, Comparison]:
    http, hop = Comparison(*await over_http(service), LOADS), Comparison(*hops(), LOADS)
    for comparison in (http, hop):
        await comparison.run()
        comparison.forget()  # the first round warms caches and connections up
        for _ in range(rounds):
            await comparison.run()
    return http, hop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--machine", default="cpu-2core", help="name of the results folder")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, service(Path(folder) / "data") as started:
        http, hop = asyncio.run(compare(started, args.rounds))
    print(f"\nOver HTTP ({args.rounds} rounds, medians)\n{http.table()}")
    print(f"\nThe hop alone\n{hop.table()}")
    print(
        "\nper core: of the processes before the hop; behind: processor time behind it for each "
        "request or token;\nfirst: until the first token. Last lines: ours / other, ours - other."
    )
    result = {
        "machine": args.machine,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "cpus": os.cpu_count(),
        "load_average_before": round(load_before, 2),
        "over_http": http.facts(),
        "hop_alone": hop.facts(),
    }
    path = Path(__file__).parent / "results" / args.machine / "gateway.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
