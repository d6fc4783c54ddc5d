"""Adapters from host memory to the pool: speed, a first prompt, and other requests meanwhile.

    python benchmarks/loading.py --out loading.json
    python benchmarks/loading.py --tiny           # a CPU: checks this program, measures nothing

12 layers of Qwen3-30B-A3B with random weights in bf16; an adapter has rank 16 on attention and all
experts (423 MB) and lies in pinned host memory.

- copy: the whole adapter, from `start_load` to its last byte's place in the pool, against one plain
  copy of the same pinned bytes to the device. Medians.
- prefill: one prompt of 2,048 tokens, from its submission to its first token, of an adapter that
  is in host memory only, against the larger of the load alone and the same with the adapter in the
  pool. Medians.
- decode: time from one step's tokens to the next one's, of 32 sequences over 8 adapters, while
  another adapter is loaded again and again without a pause, against the same without loads.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _device import device_of
from _engine_run import LARGE, TINY
from _loading_node import HostPacks, LoadingEngine, write_random_pack
from _moe_timing import kernels_of

_ROUNDS = 7
_WARM_STEPS = 8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda, cpu with --tiny")
    parser.add_argument("--steps", type=int, help="decode steps of each kind")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a load, too")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    return parser.parse_args()


def timed(bench: LoadingEngine, work: Callable[[], Any]) -> float:
    """Seconds of `work` and of all that it launched."""
    bench.wait_for_device()
    began = time.perf_counter()
    work()
    bench.wait_for_device()
    return time.perf_counter() - began


def measure_copy(bench: LoadingEngine, pinned: bool, profile: bool) -> dict[str, Any]:
    pack, pool = bench.packs.pack, bench.pool
    slot = pool.max_slots - 1
    there = torch.empty(pack.nbytes, dtype=torch.uint8, device=pool.buffer.device)
    here = torch.from_numpy(pack.memory)
    layouts = pool.layouts(pack)
    raw, loads, on_device, row = [], [], [], []

    def load() -> None:
        started = pool.start_load(slot, pack, layouts)
        started.wait()
        started.done  # noqa: B018 - takes the time
        on_device.append(started.seconds)

    for _ in range(_ROUNDS + 1):
        raw.append(timed(bench, lambda: there.copy_(here, non_blocking=True)))
        loads.append(timed(bench, load))
        row.append(timed(bench, lambda: pool.show(slot)))
        pool.unload(slot)
    raw_s, load_s = statistics.median(raw[1:]), statistics.median(loads[1:])
    figures = {
        "bytes": pack.nbytes,
        "pinned": pinned,
        "raw_gb_s": pack.nbytes / raw_s / 1e9,
        "load_gb_s": pack.nbytes / load_s / 1e9,
        "load_ms": load_s * 1e3,
        "device_ms": statistics.median(on_device[1:]) * 1e3,
        "show_ms": statistics.median(row[1:]) * 1e3,
        "share_of_raw": raw_s / load_s,
    }
    print(
        f"copy: {pack.nbytes / 1e6:.0f} MB, plain {figures['raw_gb_s']:.1f} GB/s, load "
        f"{figures['load_gb_s']:.1f} GB/s ({load_s * 1e3:.2f} ms, on the device "
        f"{figures['device_ms']:.2f} ms, show {figures['show_ms']:.2f} ms): "
        f"{figures['share_of_raw']:.1%} of plain",
        flush=True,
    )
    if profile:

        def again() -> None:
            load()
            pool.unload(slot)

        print(kernels_of(again, 2, 2), flush=True)
    return figures


def measure_prefill(bench: LoadingEngine, load_ms: float, profile: bool) -> dict[str, Any]:
    tokens = bench.shape.prefill[1]
    ref = bench.refs[0]

    def prompt() -> None:
        bench.submit(ref, tokens, 1)
        while not bench.outputs():
            pass

    def seconds(forget: bool) -> float:
        if forget:
            bench.forget(ref)
        spent = timed(bench, prompt)
        bench.drain()
        return spent

    for forget in (False, True, False, True):  # speeds become known
        seconds(forget)
    resident = statistics.median(seconds(False) for _ in range(_ROUNDS))
    coming = statistics.median(seconds(True) for _ in range(_ROUNDS))
    floor = max(load_ms / 1e3, resident)
    speeds = bench.engine._residency.speeds
    figures = {
        "tokens": tokens,
        "resident_ms": resident * 1e3,
        "load_ms": load_ms,
        "from_host_ms": coming * 1e3,
        "ratio": coming / floor,
        "one_after_the_other_ms": resident * 1e3 + load_ms,
        "measured_copy_gb_s": speeds.copy_bytes_s / 1e9,
        "measured_prefill_tokens_s": 1 / speeds.prefill_token_s if speeds.prefill_token_s else None,
    }
    print(
        f"prefill of {tokens}: resident {resident * 1e3:.2f} ms, load {load_ms:.2f} ms, from host "
        f"memory {coming * 1e3:.2f} ms: {figures['ratio']:.2f} of the larger",
        flush=True,
    )
    if profile:
        for forget in (False, True):
            print(kernels_of(partial(seconds, forget), 2, 2), flush=True)
    return figures


def decode_steps(bench: LoadingEngine, batch: int, steps: int, loads: bool) -> dict[str, Any]:
    """Seconds between steps' tokens, and how often an adapter was loaded meanwhile."""
    for i in range(batch):
        bench.submit(bench.refs[i % len(bench.refs)], bench.shape.prompt, steps + 1)
    started: set[str] = set()
    while len(started) < batch:  # prefill
        started |= set(bench.outputs())
    residency = bench.engine._residency
    extra, before, walls = bench.ref(10**6), residency.counts.bytes, []
    count = sum(residency.counts.loads.values())
    if loads:
        bench.engine.set_desired([extra])
    began = last = time.perf_counter()
    while bench.engine.has_work():
        if loads and extra.key in residency.resident():
            bench.forget(extra)
            bench.engine.set_desired([extra])
        got = len(bench.outputs())
        now = time.perf_counter()
        if got == batch:
            walls.append(now - last)
        last = now
        if got < batch and len(walls) >= steps - _WARM_STEPS:
            break
    seconds = time.perf_counter() - began
    bench.engine.set_desired([])
    bench.drain()
    bench.forget(extra)
    walls = sorted(walls[_WARM_STEPS:])
    return {
        "steps": len(walls),
        "median_ms": statistics.median(walls) * 1e3,
        "p99_ms": walls[int(len(walls) * 0.99)] * 1e3,
        "loads": sum(residency.counts.loads.values()) - count,
        "loaded_gb_s": (residency.counts.bytes - before) / seconds / 1e9,
    }


def measure_decode(bench: LoadingEngine, batch: int, steps: int) -> dict[str, Any]:
    decode_steps(bench, batch, 3 * _WARM_STEPS, loads=True)  # adapters come, and what is first
    alone = decode_steps(bench, batch, steps, loads=False)
    loading = decode_steps(bench, batch, steps, loads=True)
    figures: dict[str, Any] = {"batch": batch, "adapters": len(bench.refs)}
    figures |= {"alone": alone, "loading": loading}
    for name in ("median", "p99"):
        figures[f"{name}_ratio"] = loading[f"{name}_ms"] / alone[f"{name}_ms"]
        print(
            f"decode step, {name}: alone {alone[f'{name}_ms']:.2f} ms, while {loading['loads']} "
            f"adapters load ({loading['loaded_gb_s']:.1f} GB/s) {loading[f'{name}_ms']:.2f} ms: "
            f"{figures[f'{name}_ratio']:.2f}",
            flush=True,
        )
    return figures


def main() -> None:
    args = parse_args()
    device = device_of(args)
    random.seed(0)
    large = replace(LARGE, adapters=8, prefill=(1, 2048), steps=250, max_batch_tokens=2048)
    shape = replace(TINY, steps=60) if args.tiny else large
    batch, steps = (8 if args.tiny else 32), args.steps or shape.steps
    shape = replace(shape, steps=max(steps, 3 * _WARM_STEPS))
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.perf_counter()
        nbytes = write_random_pack(shape, folder / "adapter.pack")
        print(f"{nbytes / 1e6:.0f} MB written in {time.perf_counter() - began:.1f} s", flush=True)
        packs = HostPacks(folder / "adapter.pack")
        with packs.opened():
            bench = LoadingEngine(shape, folder, device, packs, batch)
            print(f"engine ready after {time.perf_counter() - began:.1f} s", flush=True)
            pinned = packs.pin(bench.engine)
            profile = args.profile and device == "cuda"
            copy = measure_copy(bench, pinned, profile)
            result = {
                "machine": torch.cuda.get_device_name() if device == "cuda" else "CPU",
                "date": date.today().isoformat(),
                "torch": torch.__version__,
                "config": shape.config,
                "rank": shape.rank,
                "copy": copy,
                "prefill": measure_prefill(bench, copy["load_ms"], profile),
                "decode": measure_decode(bench, batch, steps),
                "compiles_after_ready": bench.engine.report().compiles_after_ready,
            }
            bench.engine.close()
    print(f"kernels compiled after ready: {result['compiles_after_ready']}")
    print(f"all in {time.perf_counter() - began:.1f} s")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
