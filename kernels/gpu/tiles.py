"""Tile sizes: measured ones where a table has them, a heuristic elsewhere.

A table is a JSON file named by GPU and layer shape, which `python -m loraplex.kernels.gpu.tune`
writes.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "tile_tables"


@dataclass(frozen=True)
class GemmTile:
    """One grouped GEMM's tile: columns, inner step, warps, pipeline stages."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    # Programs per multiprocessor that walk the tiles; 0 = one program a tile.
    persistent: int = 0
    # Ranks that LoRA's dot takes at a time, of several adapters together: a multiple of 16.
    expand_k: int = 32
    expand_stages: int = 3  # pipeline stages of these steps
    # Wait for the shrink before the base product instead of after it: hides where the first
    # adapter's factors lie. For batches so large that the shrink is long done.
    expand_ahead: bool = False
    tma: bool = False  # weights by the copy engine (Hopper and later; whole inner steps only)
    short: bool = False  # half-filled blocks of 64 rows or more at half the height


@dataclass(frozen=True)
class ShrinkTile:
    """How a shrink is cut: segments of a block over `groups` programs, rows, inner dimension."""

    groups: int
    rows: int
    block_k: int
    splits: int
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class MoeTiles:
    """Tiles of one MoE layer's kernels at one number of tokens."""

    block_m: int
    gate_up: GemmTile
    down: GemmTile
    shrink_gate_up: ShrinkTile
    shrink_down: ShrinkTile


@dataclass(frozen=True)
class MoeShape:
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    dtype: torch.dtype  # of the activations
    fp8: bool = False  # the weights are; else in that dtype

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"H{self.hidden}_I{self.intermediate}_E{self.num_experts}_K{self.top_k}"
        return f"{sizes}_{dtype}{'_fp8' if self.fp8 else ''}"


def heuristic(shape: MoeShape, num_tokens: int) -> MoeTiles:
    """Tiles from the mean number of rows per expert: small ones stream weights, large ones reuse
    them."""
    rows = num_tokens * shape.top_k / shape.num_experts
    if shape.dtype == torch.float32:
        block_m = 16 if rows <= 16 else 32
        gemm = GemmTile(32, 32, 4, 2)
        shrink = ShrinkTile(2, 16, 32, 1, 4, 2)
        return MoeTiles(block_m, gemm, gemm, shrink, shrink)
    few = num_tokens <= 16
    shrink_gate_up = ShrinkTile(4, 16, 128, 4 if few else 1)
    shrink_down = ShrinkTile(4, 16, 128, 2 if few else 1)
    if shape.fp8:
        return _fp8_heuristic(rows, few, shrink_gate_up, shrink_down)
    if rows <= 24:
        wide = GemmTile(32 if few else 64, 128, 4, 3)
        return MoeTiles(16, wide, GemmTile(64, 128, 4, 3), shrink_gate_up, shrink_down)
    if rows <= 48:
        return MoeTiles(
            32, GemmTile(64, 64, 4, 4), GemmTile(128, 64, 4, 4), shrink_gate_up, shrink_down
        )
    shrink = ShrinkTile(2, 32, 64, 1)
    if rows <= 160:
        return MoeTiles(64, GemmTile(64, 64, 4, 4), GemmTile(128, 64, 4, 4), shrink, shrink)
    shrink = ShrinkTile(2, 64, 64, 1)
    return MoeTiles(128, GemmTile(128, 64, 8, 3), GemmTile(256, 64, 8, 3), shrink, shrink)


def _fp8_heuristic(
    rows: float, few: bool, shrink_gate_up: ShrinkTile, shrink_down: ShrinkTile
) -> MoeTiles:
    """Steps of whole blocks of the weights. Each step's product is held beside the sum that it is
    scaled into: wider tiles of tall blocks would spill their registers (ptxas, for Hopper)."""
    if rows <= 24:
        wide = GemmTile(32 if few else 64, 128, 4, 4)
        return MoeTiles(16, wide, GemmTile(64, 128, 4, 4), shrink_gate_up, shrink_down)
    if rows <= 48:
        block_m, warps, shrinks = 32, 4, (shrink_gate_up, shrink_down)
    elif rows <= 160:
        block_m, warps, shrinks = 64, 4, (ShrinkTile(2, 32, 64, 1),) * 2
    else:
        block_m, warps, shrinks = 128, 8, (ShrinkTile(2, 64, 64, 1),) * 2
    gate_up, down = GemmTile(64, 128, warps, 3), GemmTile(128, 128, warps, 3)
    return MoeTiles(block_m, gate_up, down, *shrinks)


@lru_cache(maxsize=4096)
def choose(shape: MoeShape, num_tokens: int, device: str, adapters: int) -> MoeTiles:
    """Tiles for a layer: the measured entry that is nearest in tokens and adapters (0 = base model
    only, which adapters' entries don't stand in for)."""
    table = _table(device, shape)
    entries = [key for key in table if (key[0] > 0) == (adapters > 0)]
    if not entries:
        return heuristic(shape, num_tokens)

    def distance(key: tuple[int, int]) -> tuple[float, tuple[int, int]]:
        ratio = 2 * abs(math.log(key[1] / max(num_tokens, 1)))  # tokens matter more
        return ratio + (abs(math.log(key[0] / adapters)) if adapters else 0.0), key

    return table[min(entries, key=distance)]


@lru_cache(maxsize=256)
def _table(device: str, shape: MoeShape) -> dict[tuple[int, int], MoeTiles]:
    """Entries by (adapters, tokens)."""
    path = FOLDER / device.replace(" ", "_") / f"{shape.name}.json"
    if not path.is_file():
        return {}
    return {
        (int(adapters), int(tokens)): from_json(entry)
        for adapters, entries in json.loads(path.read_text()).items()
        for tokens, entry in entries.items()
    }


def from_json(entry: dict) -> MoeTiles:
    return MoeTiles(
        entry["block_m"],
        GemmTile(**entry["gate_up"]),
        GemmTile(**entry["down"]),
        ShrinkTile(**entry["shrink_gate_up"]),
        ShrinkTile(**entry["shrink_down"]),
    )


def to_json(tiles: MoeTiles) -> dict:
    return asdict(tiles)


@cache
def device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    return torch.cuda.get_device_name(device)
