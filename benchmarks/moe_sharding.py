"""LoRA on experts that are cut over ranks ("expert-TP"): A13 and B2 replicated, or cut as well.

    python benchmarks/moe_sharding.py            # Qwen3-30B-A3B's experts; a share on one GPU
    torchrun --nproc-per-node 2 benchmarks/moe_sharding.py       # two GPUs, with what they exchange
    python benchmarks/moe_sharding.py --smoke    # a tiny shape: checks this program on a CPU

A layer is all from topk_ids to a rank's part of the output, replayed from a CUDA graph: the base
model, LoRA with replicated factors, and fully sharded. On one GPU a rank's share is timed without
the two exchanges of fully sharded layers, so its figures are a lower bound; over several they are
all-reduces by NCCL inside the graph. The sum over ranks of the layers' outputs is in no figure: it
is the same for all three. Inputs and checks are those of moe_lora.py; a fully sharded share is
compared with the float32 reference of the part that the rank alone adds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _moe_floors import Ceilings
from _moe_inputs import FILLED_SLOTS, MAIN_SHAPE, RANK, SHAPES, SMOKE_SHAPE, make_tables
from _moe_inputs import with_slots as tables_with_slots
from _moe_layer import LayerInput, Layers, relative_error
from _moe_sharded import Exchange, ShardedShape, as_replicated, runner
from _moe_timing import Captured, CudaClock, WallClock, time_alternating
from loraplex.kernels import LoraBatch

GRID = ((1, 1), (8, 8), (32, 8), (64, 8), (64, 64), (256, 8), (1024, 8), (8192, 8))
SMOKE_GRID = ((2, 2),)  # kernels are interpreted there: seconds a call
RANKS = (2, 4, 8)
MAX_ERROR = 2e-2


class Bench:
    """One process's part: of rank `rank` of `ranks`, or of rank 0 alone."""

    def __init__(self, args: argparse.Namespace, device: torch.device, rank: int, together: bool):
        self._device, self._rank, self._together = device, rank, together
        on_gpu = device.type == "cuda"
        self._dtype = torch.bfloat16 if on_gpu else torch.float32
        self._clock = CudaClock() if on_gpu else WallClock()
        self._l2 = torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else 1 << 15
        self._replays = args.replays
        self.ceilings = Ceilings.measured(
            device, lambda work: self._clock.spans([work])[0], args.smoke
        )
        self.wrong = 0

    def measure(self, shape: ShardedShape, grid: tuple[tuple[int, int], ...]) -> list[dict]:
        share = shape.replicated
        layers = Layers(share, RANK, self._dtype, self._device, self._l2)
        tables = make_tables(shape, RANK, self._dtype, self._device)
        return [self._row(shape, layers, tables, *point) for point in grid]

    def _row(
        self, shape: ShardedShape, layers: Layers, tables: Any, tokens: int, adapters: int
    ) -> dict[str, Any]:
        base = layers.base_inputs(layers.routings(tokens, adapters))
        whole = layers.lora_inputs(base, adapters, FILLED_SLOTS)
        cut = [replace(layer, tables=tables) for layer in whole]
        self._check(shape, cut[0], tables)
        exchange: Exchange = dist.all_reduce if self._together else lambda s: None
        run = runner(self._rank, shape.ranks, exchange)
        calls = [
            [layer.call() for layer in base],
            [layer.call() for layer in whole],
            [self._call(run, layer) for layer in cut],
        ]
        timed = time_alternating(
            [Captured(of_kind, self._device) for of_kind in calls], self._replays, self._clock
        )
        element = self._dtype.itemsize
        return {
            "shape": shape.name,
            "tp": shape.ranks,
            "tokens": tokens,
            "adapters": adapters,
            "rank": RANK,
            "exchanged": self._together,
            "base_us": round(timed[0].us, 2),
            "replicated_us": round(timed[1].us, 2),
            "sharded_us": round(timed[2].us, 2),
            # Of one adapter on one layer, on this rank.
            "replicated_bytes": element * shape.experts * sum(layers.shape.factor_elements(RANK)),
            "sharded_bytes": element * shape.experts * sum(shape.factor_elements(RANK)),
        }

    def _check(self, shape: ShardedShape, layer: LayerInput, tables: Any) -> None:
        """Without an exchange a layer's output is what this rank adds."""
        assert layer.token_slot is not None
        first = int(layer.token_slot.min())
        adapters = int(layer.token_slot.max()) - first + 1
        few, _ = tables_with_slots(tables, None, adapters, first)
        slot = layer.token_slot - first
        run = runner(self._rank, shape.ranks, lambda s: None)
        alone = replace(layer, tables=few, token_slot=slot)
        captured = Captured([self._call(run, alone)], self._device)
        expected = replace(alone, tables=as_replicated(few, shape, RANK, self._rank))
        error = relative_error(captured, [expected])
        if not error < MAX_ERROR:  # NaN as well
            self.wrong += 1
            print(f"tp {shape.ranks}, {layer.x.shape[0]} tokens WRONG: relative error {error:.1e}")

    def _call(self, run: Any, layer: LayerInput) -> Any:
        assert layer.token_slot is not None
        batch = LoraBatch.from_token_slot(
            layer.token_slot, ordered=True, num_adapters=int(layer.token_slot.unique().numel())
        )
        r = layer.routing
        return partial(run, layer.x, layer.weights, r.weights, r.ids, layer.tables, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--replays", type=int, default=50, help="of each graph, timed")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, on any device")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    args = parser.parse_args()
    if not (args.smoke or torch.cuda.is_available()):
        print("skipped: this measures a CUDA GPU, and torch finds none; --smoke runs on a CPU")
        return
    rank, world = (int(os.environ.get(name, d)) for name, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.manual_seed(0)  # of all ranks: x and routing are the same everywhere
    bench = Bench(args, device, rank, together=world > 1)
    whole, grid = (SMOKE_SHAPE, SMOKE_GRID) if args.smoke else (SHAPES[MAIN_SHAPE], GRID)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for ranks in (world,) if world > 1 else RANKS[: 1 if args.smoke else None]:
            rows += bench.measure(ShardedShape.of(whole, ranks), grid)
    if rank == 0:
        show(rows, bench.ceilings)
        if args.out:
            machine = torch.cuda.get_device_name() if on_gpu else "CPU"
            found = {"machine": machine, "date": date.today().isoformat(), "rows": rows}
            args.out.write_text(json.dumps(found, indent=1) + "\n")
    if world > 1:
        dist.destroy_process_group()
    if bench.wrong:
        sys.exit(f"error: {bench.wrong} rows are wrong")


def show(rows: list[dict[str, Any]], ceilings: Ceilings) -> None:
    print(ceilings)
    print("tp tokens adapters    base  replicated  sharded | MB an adapter and layer")
    for r in rows:
        print(
            f"{r['tp']:2} {r['tokens']:6} {r['adapters']:8} {r['base_us']:7.1f} "
            f"{r['replicated_us']:11.1f} {r['sharded_us']:8.1f} | "
            f"{r['replicated_bytes'] / 1e6:.2f} or {r['sharded_bytes'] / 1e6:.2f}"
            + ("" if r["exchanged"] else ", nothing exchanged")
        )


if __name__ == "__main__":
    main()
