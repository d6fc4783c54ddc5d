"""Microseconds per MoE layer with LoRA on its experts, on one GPU, beside the floors.

    python benchmarks/moe_lora.py                   # Qwen3-30B-A3B's experts, one GPU
    python benchmarks/moe_lora.py --all             # all shapes, TP and EP shares, 256 slots
    python benchmarks/moe_lora.py --fp8             # the same rows with base weights in FP8
    python benchmarks/moe_lora.py --tokens 8,64 --profile
    python benchmarks/moe_lora.py --floors 3.03 759 # floors alone, at these TB/s and TFLOP/s

A layer is all from topk_ids to the combined output, replayed from a CUDA graph; base and LoRA
alternate. All inputs are random and larger than the L2: where one call's are not, the graph
holds calls on other weights, tokens and routings, and figures are means over them. Every row's
output is compared with the float32 reference before it is timed. Floors count the bytes that
must move at the speed of a large copy, and the FLOPs at the rate of a large matrix product,
both measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _moe_floors import Ceilings, layer_floors_us
from _moe_inputs import (
    FILLED_SLOTS,
    MAIN_SHAPE,
    RANK,
    SHAPES,
    SMOKE_FP8_SHAPE,
    SMOKE_SHAPE,
    Routing,
    Shape,
    make_routing,
)
from _moe_layer import DECODE_ROUTINGS, DECODE_TOKENS, AlignCalls, Layers, relative_error
from _moe_report import HEADING, align_bars_of, bars_of, bars_text, line_of, print_slot_costs
from _moe_timing import Captured, Clock, CudaClock, WallClock, kernel_table, time_alternating

GRID = (
    (1, 1), (8, 1), (8, 8), (32, 1), (32, 8), (32, 32), (64, 1), (64, 8), (64, 32), (64, 64),
    (256, 1), (256, 8), (256, 64), (1024, 8), (8192, 1), (8192, 8), (8192, 64),
)  # fmt: skip
SMOKE_GRID = ((1, 1), (8, 8), (96, 5))
SHARES = ("tp2", "tp4", "tp8", "ep2", "ep4", "ep8")
ALIGN_BLOCKS = {64: 16, 8192: 128}  # tokens: rows of a block
ALIGN_ADAPTERS = 64
MAX_ERROR = 2e-2


class Bench:
    """Measures rows; `wrong` counts those whose output was not the reference's."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self._args, self._device = args, device
        on_gpu = device.type == "cuda"
        self._dtype = torch.bfloat16 if on_gpu else torch.float32
        self._clock: Clock = CudaClock() if on_gpu else WallClock()
        if args.smoke:
            self.l2_bytes = 2**15  # so that the tiny shape takes several calls and weights
        else:
            self.l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.ceilings = Ceilings.measured(
            device, lambda work: self._clock.spans([work])[0], args.smoke
        )
        self.rows: list[dict[str, Any]] = []
        self.align_rows: list[dict[str, Any]] = []
        self.wrong = 0

    def measure_shape(self, shape: Shape, grid: Iterable[tuple[int, int]]) -> None:
        """Measures and prints the rows of one shape, every number of slots in the same run."""
        print(f"\n{shape}\n{HEADING}", flush=True)
        layers = Layers(shape, self._args.rank, self._dtype, self._device, self.l2_bytes)
        for tokens, adapters in grid:
            for row in self._measure(layers, tokens, adapters):
                self.rows.append(row)
                print(line_of(row), flush=True)

    def _measure(self, layers: Layers, tokens: int, adapters: int) -> list[dict[str, Any]]:
        shape, rank = layers.shape, layers.rank
        routings = layers.routings(tokens, adapters)
        floors = mean_floors_us(shape, routings, rank, self.ceilings)
        base_inputs = layers.base_inputs(routings)
        slots = [n for n in self._args.slots if n is None or n >= adapters]
        variants = [base_inputs]
        variants += [layers.lora_inputs(base_inputs, adapters, n) for n in slots]
        names = ["base", *(f"LoRA, {n or adapters} slots" for n in slots)]
        series, errors = [], []
        for name, inputs in zip(names, variants, strict=True):
            captured = Captured([layer.call() for layer in inputs], self._device)
            error = relative_error(captured, inputs)
            if not error < MAX_ERROR:  # NaN as well
                self.wrong += 1
                print(f"{tokens:6} {adapters:8} {rank:4} WRONG, {name}: relative error {error:.1e}")
                return []
            series.append(captured)
            errors.append(error)
        base, *loras = time_alternating(series, self._args.replays, self._clock)
        if self._args.profile:
            for name, captured in zip(names, series, strict=True):
                print(f"  {name}, {tokens} tokens, {adapters} adapters")
                print(kernel_table(captured, self._device))
        rows = []
        for n, lora, error in zip(slots, loras, errors[1:], strict=True):
            row = {
                "shape": shape.name,
                "parallel": shape.parallel,
                "fp8": shape.fp8,
                "tokens": tokens,
                "adapters": adapters,
                "rank": rank,
                "slots": n or adapters,
                "layer_calls": len(routings),
                "base_us": round(base.us, 2),
                "lora_us": round(lora.us, 2),
                "base_floor_us": round(floors[0], 2),
                "lora_floor_us": round(floors[1], 2),
                "base_spread_us": round(base.spread_us, 2),
                "lora_spread_us": round(lora.spread_us, 2),
                "base_error": round(errors[0], 5),
                "lora_error": round(error, 5),
            }
            rows.append(row | {"bars": bars_of(row)})
        return rows

    def measure_align(self, shape: Shape, tokens: Iterable[int]) -> None:
        """Align with segments, alone."""
        print(f"\nalign with segments, {shape.experts} experts, {ALIGN_ADAPTERS} adapters")
        for count in tokens:
            block_size = ALIGN_BLOCKS[count]
            align = AlignCalls(shape, count, ALIGN_ADAPTERS, block_size, self._device)
            if not align.order_is_right():
                self.wrong += 1
                print(f"{count:6} tokens WRONG: not the order of the reference")
                continue
            (timed,) = time_alternating([align.captured], self._args.replays, self._clock)
            row = {
                "tokens": count,
                "adapters": ALIGN_ADAPTERS,
                "experts": shape.experts,
                "block_size": block_size,
                "us": round(timed.us, 2),
                "spread_us": round(timed.spread_us, 2),
                "bars": align_bars_of(shape.name, count, timed.us),
            }
            self.align_rows.append(row)
            bars = bars_text(row["bars"])
            print(f"{count:6} tokens, blocks of {block_size}: {timed.us:.2f} us | {bars}")
            if self._args.profile:
                print(kernel_table(align.captured, self._device))


def mean_floors_us(
    shape: Shape, routings: Iterable[Routing], rank: int, ceilings: Ceilings
) -> tuple[float, float]:
    floors = [layer_floors_us(shape, routing, rank, ceilings) for routing in routings]
    base, lora = zip(*floors, strict=True)
    return statistics.mean(base), statistics.mean(lora)


def print_floors(
    shapes: Iterable[Shape], grid: list[tuple[int, int]], rank: int, at: list[float]
) -> None:
    ceilings = Ceilings(at[0] * 1e12, at[1] * 1e12)
    for shape in shapes:
        print(f"\n{shape}; floors in us at {ceilings}\ntokens adapters    base    LoRA  LoRA/base")
        for tokens, adapters in grid:
            calls = DECODE_ROUTINGS if tokens <= DECODE_TOKENS else 1
            routings = [make_routing(shape, tokens, adapters, index) for index in range(calls)]
            base, lora = mean_floors_us(shape, routings, rank, ceilings)
            print(f"{tokens:6} {adapters:8} {base:7.1f} {lora:7.1f} {lora / base:10.3f}")


def parse_args() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def names(known: Iterable[str]):
        def parse(text: str) -> list[str]:
            found = list(known) if text == "all" else text.split(",")
            if unknown := set(found) - set(known):
                raise argparse.ArgumentTypeError(f"{sorted(unknown)}: not in {[*known]} or all")
            return found

        return parse

    def slot_counts(text: str) -> list[int | None]:
        return [None if part == "active" else int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    option = parser.add_argument
    option("--machine", help="name of the results folder; default: the GPU's")
    option("--out", type=Path, help="JSON file; default: in the results folder")
    option("--shapes", type=names(SHAPES), default=[MAIN_SHAPE], metavar="A,B|all")
    share_help = f"also a rank's share of {MAIN_SHAPE}"
    option("--parallel", type=names(SHARES), default=[], metavar="tp4,ep8|all", help=share_help)
    of_slots = "slots configured in the tables; active: as many as a row uses"
    filled: list[int | None] = [FILLED_SLOTS]
    option("--slots", type=slot_counts, default=filled, metavar="active,256", help=of_slots)
    all_help = "--shapes all --parallel all --slots active,256"
    option("--all", action="store_true", help=all_help)
    option("--tokens", type=numbers, metavar="8,64", help="only these rows")
    option("--adapters", type=numbers, metavar="1,8", help="only these rows")
    option("--fp8", action="store_true", help="base weights in FP8 (blocks of 128 x 128)")
    option("--rank", type=int, default=RANK)
    option("--replays", type=int, default=50, help="of each graph, timed")
    option("--profile", action="store_true", help="print each row's kernels")
    floors_help = "print floors at these ceilings, measure nothing"
    option("--floors", type=float, nargs=2, metavar=("TB_S", "TFLOP_S"), help=floors_help)
    option("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    smoke_help = "a tiny shape, to check this program; the only way on cpu; writes nothing"
    option("--smoke", action="store_true", help=smoke_help)
    args = parser.parse_args()
    if args.all:
        args.shapes, args.parallel, args.slots = list(SHAPES), list(SHARES), [None, 256]
    if args.device == "cpu" and not args.smoke:
        parser.error("--device cpu measures nothing of worth: it needs --smoke")
    return args


def result_of(args: argparse.Namespace, bench: Bench, machine: str) -> dict[str, Any]:
    return {
        "machine": machine,
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "triton": version("triton"), "cuda": torch.version.cuda},
        "ceilings": {"copy_tb_s": round(bench.ceilings.copy_bytes_s / 1e12, 3),
                     "matmul_tflop_s": round(bench.ceilings.matmul_flop_s / 1e12, 1)},
        "l2_bytes": bench.l2_bytes,
        "dtype": "bfloat16",
        "weights": "float8_e4m3fn" if args.fp8 else "bfloat16",
        "shapes": {
            name: {"hidden": shape.hidden, "intermediate": shape.intermediate,
                   "experts": shape.experts, "top_k": shape.top_k}
            for name, shape in SHAPES.items() if name in args.shapes or name == MAIN_SHAPE
        },
        "replays": args.replays,
        "rows": bench.rows,
        "align": bench.align_rows,
    }  # fmt: skip


def main() -> None:
    args = parse_args()
    grid = [
        (tokens, adapters)
        for tokens, adapters in (SMOKE_GRID if args.smoke else GRID)
        if (not args.tokens or tokens in args.tokens)
        and (not args.adapters or adapters in args.adapters)
    ]
    if args.smoke:
        smoke = SMOKE_FP8_SHAPE if args.fp8 else SMOKE_SHAPE
        shapes = [smoke] + [smoke.share(parallel) for parallel in args.parallel]
    else:
        shapes = [SHAPES[name] for name in args.shapes]
        shapes += [SHAPES[MAIN_SHAPE].share(parallel) for parallel in args.parallel]
    shapes = [replace(shape, fp8=args.fp8) for shape in shapes]
    for shape in (shape for shape in shapes if not shape.possible):
        print(f"left out: {shape}: blocks of 128 would hold gate and up rows")
    shapes = [shape for shape in shapes if shape.possible]
    if args.floors:
        print_floors(shapes, grid, args.rank, args.floors)
        return
    if args.device != "cpu" and not torch.cuda.is_available():
        if args.device:
            sys.exit("error: --device cuda, but torch finds no CUDA device")
        if not args.smoke:
            print("skipped: this measures a CUDA GPU, and torch finds none")
            return
        args.device = "cpu"
    device = torch.device(args.device or "cuda")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    began = time.monotonic()
    torch.manual_seed(0)
    with torch.inference_mode():
        bench = Bench(args, device)
        print(f"{name}: {bench.ceilings}")
        for shape in shapes:
            bench.measure_shape(shape, grid)
        aligned = [n for n in ALIGN_BLOCKS if not args.tokens or n in args.tokens]
        if aligned and (not args.adapters or ALIGN_ADAPTERS in args.adapters):
            bench.measure_align(shapes[0] if args.smoke else SHAPES[MAIN_SHAPE], aligned)
    print_slot_costs(bench.rows)
    print(f"\n{time.monotonic() - began:.0f} s")
    if bench.wrong:
        sys.exit(f"error: {bench.wrong} rows are wrong; nothing written")
    part = args.tokens or args.adapters or args.rank != RANK or MAIN_SHAPE not in args.shapes
    if args.smoke or (part and not args.out):
        print("not written: " + ("a smoke run" if args.smoke else "a part of the rows, no --out"))
        return
    model = re.search(r"\b[A-Z]+\d+\b", name)
    machine = args.machine or (model[0] if model else name.replace(" ", "-")).lower()
    path = (
        args.out
        or Path(__file__).parent / "results" / machine / f"moe_lora{'_fp8' * args.fp8}.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result_of(args, bench, machine), indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
