"""Microseconds per MoE layer on CPU, with and without LoRA adapters, at the demo model's shape.

    python benchmarks/moe_cpu.py

Layers have their own weights, factors and routing, and are visited in turn as a model does, so
that caches hold no more than they would while serving. Median over many passes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch
from loraplex.kernels import ExpertLoraTables, LoraBatch, fused_moe

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, LAYERS = 256, 128, 16, 4, 6
TOKENS = (1, 8, 32, 512)
ADAPTERS = (0, 1, 4, 32)
RANKS = (8, 16)  # of adapters in turn


def make_tables(slots: int) -> ExpertLoraTables:
    """One layer's tables with every expert adapted by every slot."""
    shape = (slots, EXPERTS)
    rank = torch.tensor(RANKS, dtype=torch.int32).repeat(slots)[:slots].view(-1, 1, 1)
    rank = rank.expand(*shape, 3).contiguous()
    sizes = torch.stack((2 * rank[..., 0] * HIDDEN, 2 * rank[..., 0] * INTERMEDIATE,
                         rank[..., 0] * INTERMEDIATE, rank[..., 0] * HIDDEN))  # fmt: skip
    end = sizes.long().flatten().cumsum(0).view(sizes.shape)
    return ExpertLoraTables(
        torch.randn(int(end.max())) * 0.05,
        *(end - sizes),
        rank=rank,
        scale=torch.full((*shape, 3), 2.0),
        layout=torch.zeros(slots, dtype=torch.int32),
    )


def median_us(tokens: int, adapters: int, base: list, tables: list, seconds: float) -> float:
    """Median time of one layer: tokens spread evenly over `adapters` and the base model."""
    x = torch.randn(tokens, HIDDEN)
    slot = torch.arange(tokens, dtype=torch.int32) % (adapters + 1) if adapters else None
    batch = None
    if slot is not None:
        slot[slot == adapters] = -1
        batch = LoraBatch.from_token_slot(slot.sort().values)
    routing = []
    for _ in range(LAYERS):
        logits = torch.randn(tokens, EXPERTS)
        weights, ids = logits.softmax(1).topk(TOP_K)
        routing.append((weights, ids))
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < deadline:
        start = time.perf_counter()
        for (w13, w2), (weights, ids), lora in zip(base, routing, tables, strict=True):
            fused_moe(x, w13, w2, weights, ids, lora if batch else None, batch)
        times.append((time.perf_counter() - start) / LAYERS * 1e6)
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--machine", default="cpu-2core", help="name of the results folder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time per figure")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    base = [
        (
            torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) * 0.05,
            torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) * 0.05,
        )
        for _ in range(LAYERS)
    ]
    tables = [make_tables(max(ADAPTERS)) for _ in range(LAYERS)]
    rows = []
    print(f"us per MoE layer, {args.threads} threads")
    print("tokens" + "".join(f"{f'{n} adapters' if n else 'base':>14}" for n in ADAPTERS))
    with torch.inference_mode():
        for tokens in TOKENS:
            line = f"{tokens:6}"
            for adapters in ADAPTERS:
                us = median_us(tokens, adapters, base, tables, args.seconds)
                rows.append({"tokens": tokens, "adapters": adapters, "us": round(us, 1)})
                line += f"{us:14.0f}"
            print(line, flush=True)
    result = {
        "machine": args.machine,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": args.threads,
        "shape": {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "experts": EXPERTS,
                  "top_k": TOP_K, "layers": LAYERS, "ranks": RANKS, "dtype": "float32"},
        "rows": rows,
    }  # fmt: skip
    path = Path(__file__).parent / "results" / args.machine / "moe_cpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
