"""Adapters of all kinds cycle through every tier of a node; each answer and each byte is checked.

    python benchmarks/churn.py

The demo model on the CPU, and random adapters of mixed rank, format and precision: an embedded S3
server holds all of them, the disk 60 % of their bytes, memory 30 %, the pool 20 adapters. Each
answer is compared with that of an engine that holds this adapter alone. Freed pages of the pool are
overwritten with NaN, all adapters have the same prompts, some requests are given up, and adapters
are purged now and then, in use or not. At the end every tier's books must be right to the byte,
also when all adapters have gone (`tests/workers/churn.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

from loraplex.adapter_store import EmbeddedS3, ObjectStore

# Last, so that nobody takes the folders at the root for packages of their names.
sys.path.append(str(Path(__file__).parents[1]))

from tests.workers.churn import check_bytes, churning, run


def by_tenth(samples: list[int]) -> list[int]:
    return [samples[len(samples) * tenth // 10 - 1] for tenth in range(1, 11)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--machine", default="cpu-2core", help="name of the results folder")
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=60.0, help="no more requests after them")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, EmbeddedS3(Path(folder) / "store") as server:
        store = ObjectStore(
            server.url,
            endpoint=server.endpoint,
            access_key=server.access_key,
            secret_key=server.secret_key,
        )
        with churning(store, Path(folder), args.adapters, rng) as node:
            prepared = time.monotonic() - started
            found = run(node, args.requests, rng, 60 * args.minutes)
            held = check_bytes(node)
            alike, stored = node.alike(), sum(node.sizes.values())
    result = {
        "machine": args.machine,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "loraplex": version("loraplex")},
        "load_average": os.getloadavg()[0],  # beside 1 or so that this run makes itself
        "cores": os.cpu_count(),
        "seed": args.seed,
        "adapters": args.adapters,
        "requests_planned": args.requests,
        "stored_bytes": stored,
        "held_bytes_at_end": held,  # as the files and pages say, too; then none
        "pairs_answering_alike": alike,  # share; a mix-up of those wouldn't show
        "preparation_seconds": prepared,
        **asdict(found),
        "anonymous_bytes": by_tenth(found.anonymous_bytes),
    }
    print(json.dumps(result, indent=1))
    path = Path(__file__).parent / "results" / args.machine / "churn.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
