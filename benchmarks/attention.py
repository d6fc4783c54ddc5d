"""Microseconds of one layer's attention over the paged KV cache, on one GPU, beside its floor.

    python benchmarks/attention.py                  # Qwen3-30B-A3B's heads
    python benchmarks/attention.py --shapes all --out attention.json
    python benchmarks/attention.py --rows decode --sweep    # also other tiles than the chosen ones

A row is a step of equal sequences: decode of one token each after a context, or prefill of whole
prompts. Calls are replayed from a CUDA graph, over as many layers' caches as are larger than the
L2 together, because in a model the weights pass through it between two layers. `us` is attention
alone, `with_write_us` with the write of new keys and values before it. The floor counts the bytes
of keys, values, queries and outputs at the speed of a large copy, or the FLOPs at the rate of a
large matrix product, both measured in the same run. `sdpa_us` is torch's flash attention on
contiguous inputs of the same sizes, timed in turn with ours. Every row's output is compared with
torch's before it is timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from _moe_floors import Ceilings
from _moe_timing import Captured, Clock, CudaClock, WallClock, time_alternating
from loraplex.workers.attention import PagedBatch, PagedKVCache
from loraplex.workers.step import SequenceStep
from torch.nn.attention import SDPBackend, sdpa_kernel

BLOCK_SIZE = 16
MAX_CALLS = 256  # in one graph
MAX_CACHE_BYTES = 8 << 30
MAX_ERROR = 2e-2  # relative Frobenius, of bf16 against torch's bf16


@dataclass(frozen=True)
class Heads:
    heads: int
    kv_heads: int
    d: int
    dv: int
    latent: bool = False
    window: int | None = None


SHAPES = {
    "qwen3-30b-a3b": Heads(32, 4, 128, 128),
    "olmoe": Heads(16, 16, 128, 128),
    "gpt-oss-20b": Heads(64, 8, 64, 64),
    "gpt-oss-20b-window": Heads(64, 8, 64, 64, window=128),
    "deepseek-v2-lite": Heads(16, 1, 576, 512, latent=True),
}
# sequences, tokens before, new tokens
DECODE = [(batch, context - 1, 1) for context in (200, 2048, 8192) for batch in (1, 8, 32, 64)]
PREFILL = [(16, 0, 1024), (1, 0, 8192)]
SMOKE_HEADS = Heads(4, 2, 16, 16)
SMOKE_ROWS = [(2, 40, 1), (2, 0, 24)]
SWEPT_TILES = {  # rows (None: those chosen), keys, warps, stages
    "decode": [(None, n, w, s) for n in (32, 64, 128) for w in (4, 8) for s in (3, 4, 5)],
    "prefill": [(m, n, w, s) for m in (64, 128) for n in (32, 64, 128)
                for w in (4, 8) for s in (3, 5)],
}  # fmt: skip


class Problem:
    """One row's inputs: `calls` layers' caches, and a step whose blocks are scattered over them."""

    def __init__(
        self,
        shape: Heads,
        row: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        l2_bytes: int,
    ):
        self.shape, (self.sequences, before, self.new) = shape, row
        self.length = before + self.new
        self.dtype, self.device = dtype, device
        per_sequence = -(-self.length // BLOCK_SIZE)
        blocks = self.sequences * per_sequence
        tokens = blocks * BLOCK_SIZE
        cache_bytes = tokens * shape.kv_heads * (shape.d + shape.dv * (not shape.latent)) * 2
        calls = max(2, min(MAX_CALLS, -(-2 * l2_bytes // cache_bytes)))
        self.calls = max(1, min(calls, MAX_CACHE_BYTES // cache_bytes))
        self.cache = PagedKVCache(
            self.calls, blocks, BLOCK_SIZE, shape.kv_heads, shape.d, dtype, device, shape.dv,
            shape.latent,
        )  # fmt: skip
        self.cache.k.normal_()
        if not shape.latent:
            self.cache.v.normal_()
        self.blocks = torch.randperm(blocks).view(self.sequences, per_sequence)
        steps = [SequenceStep([0] * self.new, before, b, -1) for b in self.blocks.tolist()]
        self.batch = PagedBatch.plan(steps, BLOCK_SIZE, device)
        rows = self.sequences * self.new
        self.q = torch.randn(rows, shape.heads, shape.d, device=device).to(dtype)
        self.k = torch.randn(rows, shape.kv_heads, shape.d, device=device).to(dtype)
        self.v = (
            None if shape.latent else self.k.new_empty(rows, shape.kv_heads, shape.dv).normal_()
        )

    def read(self, layer: int) -> torch.Tensor:
        return self.cache.read(layer, self.q, self.batch, window=self.shape.window)

    def write_and_read(self, layer: int) -> torch.Tensor:
        return self.cache.attend(
            layer, self.q, self.k, self.v, self.batch, window=self.shape.window
        )

    def contiguous(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [B, H, N, D], k [B, KVH, S, D] and v as torch's attention takes them."""
        blocks = self.blocks.to(self.device)

        def gathered(cache: torch.Tensor) -> torch.Tensor:
            x = cache[layer][blocks].flatten(1, 2)[:, : self.length]
            return x.transpose(1, 2).contiguous()

        q = self.q.view(self.sequences, self.new, *self.q.shape[1:]).transpose(1, 2).contiguous()
        return q, gathered(self.cache.k), gathered(self.cache.v)

    def torchs(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = None
        if self.shape.window is not None:
            query = torch.arange(self.length - self.new, self.length, device=self.device)[:, None]
            key = torch.arange(self.length, device=self.device)[None, :]
            mask = (key <= query) & (key > query - self.shape.window)
        causal = mask is None and self.new > 1
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)

    def error(self) -> float:
        """Relative Frobenius distance from torch's output, on the first layer."""
        q, k, v = self.contiguous(0)
        # One KV head at a time: where torch has no fused kernel, it stores all logits.
        groups = q.chunk(k.shape[1], 1)
        heads = [
            self.torchs(groups[h], k[:, h : h + 1], v[:, h : h + 1]) for h in range(len(groups))
        ]
        wanted = torch.cat(heads, 1).transpose(1, 2).reshape(len(self.q), -1).float()
        return float((self.read(0).float() - wanted).norm() / wanted.norm())

    def floor_us(self, ceilings: Ceilings) -> float:
        s, n, length = self.shape, self.new, self.length
        seen = min(length, s.window + n - 1) if s.window else length
        width = s.d + s.dv * (not s.latent)
        moved = 2 * self.sequences * (seen * s.kv_heads * width + n * s.heads * (s.d + s.dv))
        pairs = sum(min(length - n + i + 1, s.window or length) for i in range(n))
        return ceilings.us(moved, 2 * self.sequences * pairs * s.heads * (s.d + s.dv))


def sdpa_calls(problem: Problem) -> list[Callable[[], torch.Tensor]] | None:
    """torch's flash attention, on copies of as many layers; None where it serves no such heads."""
    if problem.shape.window is not None or problem.device.type != "cuda":
        return None
    inputs = [problem.contiguous(layer) for layer in range(problem.calls)]

    def call(args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return problem.torchs(*args)

    try:
        call(inputs[0])
    except RuntimeError:
        return None
    return [lambda args=args: call(args) for args in inputs]


class Bench:
    """Measures rows; `wrong` counts those whose output was not torch's."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self._args, self._device = args, device
        on_gpu = device.type == "cuda"
        self._dtype = torch.bfloat16 if on_gpu else torch.float32
        self._clock: Clock = CudaClock() if on_gpu else WallClock()
        self.l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else 2**12
        self.ceilings = Ceilings.measured(
            device, lambda work: self._clock.spans([work])[0], args.smoke
        )
        self.rows: list[dict[str, Any]] = []
        self.wrong = 0

    def measure(self, name: str, shape: Heads, row: tuple[int, int, int]) -> None:
        problem = Problem(shape, row, self._dtype, self._device, self.l2_bytes)
        kind = "decode" if problem.new == 1 else "prefill"
        what = f"{name:20} {kind:8} {problem.sequences:3} x {problem.length:5}"
        error = problem.error()
        if not error < MAX_ERROR:  # NaN as well
            self.wrong += 1
            print(f"{what} WRONG: relative error {error:.1e}", flush=True)
            return
        layers = range(problem.calls)
        series = [
            Captured([lambda n=n: problem.read(n) for n in layers], self._device),
            Captured([lambda n=n: problem.write_and_read(n) for n in layers], self._device),
        ]
        theirs = sdpa_calls(problem)
        if theirs is not None:
            series.append(Captured(theirs, self._device))
        ours, with_write, *others = time_alternating(series, self._args.replays, self._clock)
        floor = problem.floor_us(self.ceilings)
        result: dict[str, Any] = {
            "shape": name,
            "kind": kind,
            "sequences": problem.sequences,
            "length": problem.length,
            "new_tokens": problem.new,
            "layer_calls": problem.calls,
            "us": round(ours.us, 2),
            "spread_us": round(ours.spread_us, 2),
            "with_write_us": round(with_write.us, 2),
            "floor_us": round(floor, 2),
            "of_floor": round(floor / ours.us, 3),
            "sdpa_us": round(others[0].us, 2) if others else None,
            "error": round(error, 5),
        }
        print(
            f"{what} {ours.us:9.2f} {with_write.us:9.2f} {floor:9.2f} {floor / ours.us:8.2f} "
            f"{result['sdpa_us'] or '-':>9}",
            flush=True,
        )
        if self._args.sweep:
            result["tiles"] = self._sweep(problem, kind)
        self.rows.append(result)

    def _sweep(self, problem: Problem, kind: str) -> dict[str, float]:
        """us by tile, the fastest first."""
        module = import_module("loraplex.kernels.gpu.paged_attention")
        choose = getattr(module, f"{kind}_tile")
        layers = range(problem.calls)
        found = {}
        for rows, keys, warps, stages in SWEPT_TILES[kind]:

            def other(shape, itemsize, rows=rows, rest=(keys, warps, stages)):
                return module.AttentionTile(rows or choose(shape, itemsize).rows, *rest)

            name = f"{rows or 'chosen'} x {keys}, {warps} warps, {stages} stages"
            try:
                with mock.patch.object(module, f"{kind}_tile", other):
                    captured = Captured([lambda n=n: problem.read(n) for n in layers], self._device)
            except Exception as error:  # more shared memory or registers than there are
                print(f"    {name}: {type(error).__name__}")
                continue
            (timed,) = time_alternating([captured], self._args.replays, self._clock)
            found[name] = round(timed.us, 2)
        found = dict(sorted(found.items(), key=lambda item: item[1]))
        for name, us in list(found.items())[:5]:
            print(f"    {us:9.2f}  {name}", flush=True)
        return found


def parse_args() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        found = list(SHAPES) if text == "all" else text.split(",")
        if unknown := set(found) - set(SHAPES):
            raise argparse.ArgumentTypeError(f"{sorted(unknown)}: not in {[*SHAPES]} or all")
        return found

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    option = parser.add_argument
    option("--out", type=Path, help="JSON file; without it nothing is written")
    option("--shapes", type=names, default=["qwen3-30b-a3b"], metavar="A,B|all")
    option("--rows", choices=("decode", "prefill", "all"), default="all")
    option("--replays", type=int, default=30, help="of each graph, timed")
    option("--sweep", action="store_true", help="time other tiles as well")
    smoke_help = "tiny rows, to check this program; on a CPU in Triton's interpreter"
    option("--smoke", action="store_true", help=smoke_help)
    return parser.parse_args()


def rows_of(args: argparse.Namespace) -> Iterable[tuple[str, Heads, tuple[int, int, int]]]:
    if args.smoke:
        return [("smoke", SMOKE_HEADS, row) for row in SMOKE_ROWS]
    rows = {"decode": DECODE, "prefill": PREFILL, "all": DECODE + PREFILL}[args.rows]
    return [(name, SHAPES[name], row) for name in args.shapes for row in rows]


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available() and not args.smoke:
        print("skipped: this measures a CUDA GPU, and torch finds none")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with torch.inference_mode():
        bench = Bench(args, device)
        print(
            f"{bench.ceilings}\n{'us':>53} {'+ write':>9} {'floor':>9} {'of floor':>8} {'sdpa':>9}"
        )
        for name, shape, row in rows_of(args):
            bench.measure(name, shape, row)
    if bench.wrong:
        sys.exit(f"error: {bench.wrong} rows are wrong; nothing written")
    if args.out is None or args.smoke:
        print("not written: " + ("a smoke run" if args.smoke else "no --out"))
        return
    result = {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "triton": version("triton"), "cuda": torch.version.cuda},
        "ceilings": {"copy_tb_s": round(bench.ceilings.copy_bytes_s / 1e12, 3),
                     "matmul_tflop_s": round(bench.ceilings.matmul_flop_s / 1e12, 1)},
        "dtype": "bfloat16",
        "replays": args.replays,
        "rows": bench.rows,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
