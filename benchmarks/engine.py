"""Microseconds of decode steps and tokens per second of prefill, of one engine on one GPU.

    python benchmarks/engine.py --out engine.json
    python benchmarks/engine.py --tiny            # a CPU: checks this program, measures nothing

12 layers of Qwen3-30B-A3B with random weights in bf16; adapters of rank 16 on attention and on all
experts, random too, are written straight into the pool. Requests have 128 tokens and decode 72
at temperature 1. `forward` is the median time on the device, between events, of the decode graph's
replay (all layers, without lm_head and sampling); `step` of all that a step launches; `wall` is
from one step's tokens to the next one's. The device's idle share is 1 - step / wall. Prefill is 16
prompts of 1,024 tokens, from the first step to the last first token, median of 7 rounds after one.
The byte floor of one token is what it must read (its experts' weights, attention, lm_head) at the
speed of a large copy, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _device import device_of
from _engine_run import LARGE, TINY, BenchEngine, Shape, Spans
from _moe_floors import Ceilings
from _moe_timing import CudaClock, WallClock, kernels_of

_PREFILL_ROUNDS = 7
_HEAD_ROUNDS = 50


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda, cpu with --tiny")
    parser.add_argument("--batches", type=_numbers, help="default: 1,8,32,64")
    parser.add_argument("--no-overlap", action="store_true")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--prefill-only", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print the kernels of prefill")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    return parser.parse_args()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def measure_decode(bench: BenchEngine, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []
    for batch in batches:
        for adapters in sorted({0, 1, min(batch, bench.shape.adapters)}):
            times = bench.decode(batch, adapters)
            row = {
                "batch": batch,
                "adapters": adapters,
                "forward_us": times.forward_us,
                "step_us": times.step_us,
                "wall_us": times.wall_us,
                "idle_share": 1 - times.step_us / times.wall_us,
            }
            rows.append(row)
            print(
                f"decode  batch {batch:3} adapters {adapters:3}: forward {times.forward_us:8.0f} us"
                f"  step {times.step_us:8.0f} us  wall {times.wall_us:8.0f} us"
                f"  idle {row['idle_share']:6.1%}",
                flush=True,
            )
    return rows


def measure_prefill(bench: BenchEngine, profile: bool) -> list[dict[str, Any]]:
    rows = []
    requests, tokens = bench.shape.prefill
    for adapters in sorted({0, 1, min(requests, bench.shape.adapters)}):
        bench.prefill(adapters)
        rates = [bench.prefill(adapters) for _ in range(_PREFILL_ROUNDS)]
        rows.append(
            {
                "requests": requests,
                "tokens": tokens,
                "adapters": adapters,
                "tokens_s": statistics.median(rates),
            }
        )
        print(
            f"prefill {requests} x {tokens}, adapters {adapters:3}: {rows[-1]['tokens_s']:.0f} /s"
            f" (rounds: {', '.join(f'{rate:.0f}' for rate in rates)})",
            flush=True,
        )
        if profile and bench.runner.device.type == "cuda":
            print(kernels_of(partial(bench.prefill, adapters), 2, 2), flush=True)
    return rows


def measure_one_token(bench: BenchEngine, ceilings: Ceilings) -> dict[str, float]:
    """One base token with lm_head, queued without gaps, beside the bytes that it must read."""
    runner, shape = bench.runner, bench.shape
    floor = ceilings.us(token_bytes(shape), 0)
    if runner.graphs is None and runner.device.type == "cuda":
        return {"floor_us": floor, "bytes": token_bytes(shape)}
    hidden = torch.zeros(1, shape.config["hidden_size"], dtype=runner.dtype, device=runner.device)
    graphs = runner.graphs
    replay = graphs._graphs[1, 0][0].replay if graphs is not None else lambda: None

    def token() -> None:
        replay()
        runner.model.logits(hidden)

    spans = Spans(runner.device)
    timed = spans.around(token)
    with torch.inference_mode():
        if graphs is not None:
            graphs._memory[-1] = 1  # one row that is no padding, over whatever was there
        for _ in range(_HEAD_ROUNDS):
            timed()
    us = statistics.median(spans.seconds()) * 1e6
    print(f"one base token with lm_head: {us:.0f} us, floor {floor:.0f} us, ratio {us / floor:.2f}")
    return {"us": us, "floor_us": floor, "bytes": token_bytes(shape)}


def token_bytes(shape: Shape) -> float:
    """Bytes of weights that one token reads."""
    c = shape.config
    h, d = c["hidden_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    attention = h * (q + 2 * kv) + q * h
    experts = c["num_experts_per_tok"] * 3 * h * c["moe_intermediate_size"]
    router = h * c["num_experts"]
    elements = c["num_hidden_layers"] * (attention + experts + router) + h * c["vocab_size"]
    return elements * (4 if c["torch_dtype"] == "float32" else 2)


def main() -> None:
    args = parse_args()
    device = device_of(args)
    shape = TINY if args.tiny else LARGE
    batches = args.batches or shape.batches
    if max(batches) > max(shape.batches):
        sys.exit(f"error: --batches must be at most {max(shape.batches)}, got {max(batches)}")
    clock = CudaClock() if device == "cuda" else WallClock()
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    ceilings = Ceilings.measured(
        torch.device(device), lambda work: clock.spans([work])[0], small=args.tiny
    )
    print(f"{name}: {ceilings}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = BenchEngine(shape, Path(folder), device, not args.no_overlap, not args.no_graphs)
        capture = vars(bench.runner.captured) if bench.runner.captured else None
        print(f"decode graphs: {capture}")
        result = {
            "machine": name,
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "config": shape.config,
            "rank": shape.rank,
            "overlap": not args.no_overlap,
            "graphs": capture,
            "copy_tb_s": ceilings.copy_bytes_s / 1e12,
            "decode": [] if args.prefill_only else measure_decode(bench, batches),
            "prefill": measure_prefill(bench, args.profile),
            "compiles_after_ready": bench.engine.report().compiles_after_ready,
            "one_token": measure_one_token(bench, ceilings),
        }
        bench.close()
    print(f"kernels compiled after ready: {result['compiles_after_ready']}")
    if args.out and args.prefill_only:
        print("not written: a part of the rows")
    elif args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
