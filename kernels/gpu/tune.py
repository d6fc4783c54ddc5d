"""Find the fastest tiles of a layer shape on this GPU: python -m loraplex.kernels.gpu.tune --help

Coordinate descent over the whole layer's time in a CUDA graph: block size and the two products'
tiles on the base model, then again with adapters, and the shrinks' tiles. Candidates are compiled
by a process per core before they are timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from ..lora_batch import TUNED_ADAPTERS
from ..runner import MoeRunner
from . import tiles as tile_tables
from .fused import FusedBackend
from .tiles import GemmTile, MoeShape, MoeTiles, ShrinkTile
from .tune_problem import Problem

# Layers of published models: hidden, intermediate (of a rank), experts, top-k.
SHAPES = {
    "qwen3-30b": (2048, 768, 128, 8),
    "olmoe": (2048, 1024, 64, 8),
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "qwen3-235b-tp4": (4096, 384, 128, 8),
    "qwen3-235b-tp8": (4096, 192, 128, 8),
    "deepseek-v2-lite": (2048, 1408, 64, 6),
}
TOKENS = (1, 8, 32, 64, 256, 1024, 8192)
# Ranks at a time, pipeline stages, whether the first group is looked up ahead.
EXPANDS = (
    (16, 3, False), (32, 3, False), (64, 1, False), (64, 3, False), (16, 3, True), (32, 3, True),
    (64, 3, True),
)  # fmt: skip


def _gemm_tiles(block_m: int, fp8: bool) -> list[GemmTile]:
    if fp8:  # steps within a block of the weights, no copy engine
        if block_m <= 32:
            return [
                GemmTile(n, 128, warps, stages)
                for n, warps, stages in (
                    (16, 4, 4), (16, 4, 6), (32, 2, 4), (32, 4, 3), (32, 4, 4), (32, 4, 6),
                    (64, 4, 3), (64, 4, 4), (64, 8, 4), (128, 4, 3), (128, 8, 4),
                )
            ]  # fmt: skip
        return [
            GemmTile(n, k, warps, stages, persistent)
            for n, k, warps, stages, persistent in (
                (64, 64, 4, 4, 0), (64, 128, 4, 3, 0), (64, 128, 8, 3, 0), (64, 128, 8, 4, 0),
                (128, 64, 8, 3, 0), (128, 64, 8, 4, 0), (128, 128, 8, 3, 0), (128, 128, 8, 3, 1),
            )
        ]  # fmt: skip
    if block_m <= 32:
        return [
            GemmTile(n, k, warps, stages)
            for n, k, warps, stages in (
                (16, 128, 4, 4), (16, 256, 4, 3), (32, 64, 4, 5), (32, 128, 4, 3), (32, 128, 4, 4),
                (32, 128, 2, 4), (32, 256, 4, 3), (64, 64, 4, 4), (64, 64, 4, 6), (64, 128, 4, 3),
                (64, 128, 4, 4), (64, 128, 8, 3), (128, 64, 4, 4), (64, 256, 4, 2),
            )
        ]  # fmt: skip
    return [
        GemmTile(n, k, warps, stages, persistent, tma=tma)
        for n, k, warps, stages, persistent, tma in (
            (64, 64, 4, 3, 0, False), (128, 64, 4, 3, 0, False), (128, 64, 4, 3, 0, True),
            (128, 64, 8, 3, 0, False), (128, 64, 8, 4, 0, False), (128, 64, 8, 3, 0, True),
            (128, 64, 8, 4, 0, True), (256, 64, 8, 3, 0, False), (256, 64, 8, 4, 0, False),
            (256, 64, 8, 3, 0, True), (256, 64, 8, 4, 0, True), (256, 64, 8, 3, 1, True),
        )
    ]  # fmt: skip


def _shrink_tiles(block_m: int) -> list[ShrinkTile]:
    if block_m <= 32:
        return [
            ShrinkTile(groups, 16, k, splits, warps)
            for groups, k, splits, warps in (
                (1, 128, 1, 4), (2, 128, 1, 4), (4, 128, 1, 4), (8, 128, 1, 4), (4, 256, 1, 4),
                (4, 128, 2, 4), (4, 128, 4, 4), (4, 64, 2, 2), (2, 128, 4, 4), (4, 128, 8, 4),
                (1, 128, 4, 4), (1, 256, 4, 4), (1, 128, 8, 4),
            )
        ]  # fmt: skip
    return [
        ShrinkTile(groups, rows, k, 1, warps, stages)
        for groups, rows, k, warps, stages in (
            (4, 16, 128, 4, 3), (8, 16, 128, 4, 3), (16, 16, 128, 4, 3), (8, 16, 256, 4, 2),
            (4, 32, 128, 4, 3), (2, 32, 128, 4, 3), (2, 64, 64, 4, 3), (2, 64, 64, 4, 5),
            (1, 128, 64, 4, 3), (2, 64, 128, 4, 2),
        )
    ]  # fmt: skip


def _expands(tile: GemmTile, block_m: int) -> list[GemmTile]:
    """Small blocks leave out what only pays in large ones."""
    return [
        replace(tile, expand_k=k, expand_stages=stages, expand_ahead=ahead)
        for k, stages, ahead in EXPANDS
        if block_m >= 64 or not ahead
    ]


def _steps(block_m: int, adapters: int, fp8: bool) -> list[tuple[str, Callable[[MoeTiles], list]]]:
    """What is varied in turn, and its candidates given the best tiles so far."""
    gemms, shrinks = _gemm_tiles(block_m, fp8), _shrink_tiles(block_m)
    steps: list[tuple[str, Callable[[MoeTiles], list]]] = [
        ("gate_up", lambda _: gemms),
        ("down", lambda _: gemms),
    ]
    if block_m >= 64:
        steps += [
            ("gate_up", lambda best: [replace(best.gate_up, short=True)]),
            ("down", lambda best: [replace(best.down, short=True)]),
        ]
    if adapters:
        steps += [
            ("shrink_gate_up", lambda _: shrinks),
            ("shrink_down", lambda _: shrinks),
            ("gate_up", lambda best: _expands(best.gate_up, block_m)),
            ("down", lambda best: _expands(best.down, block_m)),
        ]
    return steps


def _block_sizes(shape: MoeShape, num_tokens: int, adapters: int) -> list[int]:
    rows = num_tokens * shape.top_k / shape.num_experts
    if rows <= 8:
        return [16]
    if rows <= 32:
        return [16, 32, 64]
    # Many short runs waste less of a lower block.
    return [64, 128] if rows <= 256 or adapters >= 32 else [128]


def layer_us(tiles: MoeTiles, calls: list[tuple], budget_ms: float = 15) -> float:
    """Median time of a layer call in a CUDA graph of all `calls`."""
    runner = MoeRunner(FusedBackend(tiles))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which fills the inputs
    with torch.cuda.stream(stream):
        for call in calls:
            runner(*call)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                runner(*call)
    times: list[float] = []
    graph.replay()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin) * 1e3 < budget_ms:
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def _try(tiles: MoeTiles, calls: list[tuple], say: str = "") -> float:
    """`layer_us`; infinite for tiles that this GPU has not enough shared memory for."""
    try:
        us = layer_us(tiles, calls)
    except Exception as error:
        if "out of resource" not in str(error):
            raise
        us = float("inf")
    if say:
        print(f"    {say} {us:9.1f}", flush=True)
    return us


class Compiler:
    """Compiles candidates in parallel, into Triton's disk cache, by running each once."""

    def __init__(self, shape: MoeShape, processes: int):
        self._pool = ProcessPoolExecutor(
            processes, get_context("spawn"), initializer=_start_compiling, initargs=(shape,)
        )
        self._done: set[tuple[MoeTiles, bool]] = set()

    def __call__(self, num_tokens: int, lora: bool, candidates: list[MoeTiles]) -> None:
        new = [tiles for tiles in candidates if (tiles, lora) not in self._done]
        self._done.update((tiles, lora) for tiles in new)
        list(self._pool.map(_compile, [(num_tokens, lora, tiles) for tiles in new]))

    def close(self) -> None:
        self._pool.shutdown()


_problem: Problem  # of a compiling process


def _start_compiling(shape: MoeShape) -> None:
    global _problem
    _problem = Problem(shape, 1)


def _compile(job: tuple[int, bool, MoeTiles]) -> None:
    num_tokens, lora, tiles = job
    _try(tiles, _problem.calls(num_tokens, int(lora))[:1])


def tune(
    problem: Problem, num_tokens: int, adapters: int, compiler: Compiler, verbose: bool
) -> tuple[MoeTiles, float]:
    """The best tiles found for a number of tokens, and their time."""
    calls = problem.calls(num_tokens, adapters)
    overall: tuple[MoeTiles, float] | None = None
    for block_m in _block_sizes(problem.shape, num_tokens, adapters):
        gemms, shrinks = _gemm_tiles(block_m, problem.shape.fp8), _shrink_tiles(block_m)
        best = MoeTiles(block_m, gemms[3], gemms[3], shrinks[2], shrinks[2])
        # Both products' tiles at once: the first step then finds the second one's compiled.
        both = zip(gemms, [*gemms[1:], gemms[0]], strict=True)
        first = [replace(best, gate_up=one, down=other) for one, other in both]
        compiler(num_tokens, adapters > 0, [best, *first])
        best_us = _try(best, calls)
        for name, candidates in _steps(block_m, adapters, problem.shape.fp8):
            options = [replace(best, **{name: candidate}) for candidate in candidates(best)]
            compiler(num_tokens, adapters > 0, options)
            for tiles in options:
                say = f"T={num_tokens} a={adapters} bm={block_m} {name} {getattr(tiles, name)}"
                us = _try(tiles, calls, say if verbose else "")
                if us < best_us:
                    best, best_us = tiles, us
        case = f"T={num_tokens} adapters={adapters} block_m={block_m}"
        print(f"  {case}: {best_us:.1f} us", flush=True)
        if overall is None or best_us < overall[1]:
            overall = best, best_us
    assert overall is not None
    return overall


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["qwen3-30b"], choices=[*SHAPES, "all"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--adapters", nargs="+", type=int, default=[0, *TUNED_ADAPTERS])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--fp8", action="store_true", help="weights in FP8")
    parser.add_argument("--out", type=Path, default=tile_tables.FOLDER)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    names = list(SHAPES) if "all" in args.shapes else args.shapes
    for name in names:
        shape = MoeShape(*SHAPES[name], getattr(torch, args.dtype), args.fp8)
        begin = time.perf_counter()
        compiler = Compiler(shape, args.processes)
        problem = Problem(shape, max(args.adapters))
        device = tile_tables.device_name(torch.device("cuda")).replace(" ", "_")
        path = args.out / device / f"{shape.name}.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        for num_tokens in args.tokens:
            for adapters in args.adapters:
                if adapters > num_tokens:
                    continue
                tiles, us = tune(problem, num_tokens, adapters, compiler, args.verbose)
                entries = found.setdefault(str(adapters), {})
                entries[str(num_tokens)] = tile_tables.to_json(tiles)
                print(f"{name} T={num_tokens} {adapters} adapters: {us:.1f} us", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {time.perf_counter() - begin:.0f} s, written to {path}", flush=True)
        compiler.close()
        del problem


if __name__ == "__main__":
    main()
