"""A Triton backend of plain stages: base products without LoRA, which acts between them.

What the fused backend is measured against, and what it falls back to where hooks need to see the
intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..aligned import AlignedBatch
from ..block_fp8 import FP8, FP8_BLOCK
from ..checks import check, check_contiguous, check_token_slot, check_topk_ids
from ..lora_batch import LoraBatch
from ..lora_tables import ExpertLoraTables
from ..moe_weights import MoeWeights
from ..runner import MoeBackend
from .align import align
from .combine import combine_kernel, invert_kernel
from .gate_up import swiglu
from .grouped_gemm import grouped_gemm_kernel
from .launch import USE_PDL, cdiv, next_power_of_2, pdl_launch_dependents, pdl_wait
from .lora import (
    Shrunk,
    batch_args,
    expand_,
    expand_args,
    expand_flags,
    shrink_down,
    shrink_gate_up,
)
from .tiles import GemmTile, MoeShape, MoeTiles, choose, device_name


@dataclass(frozen=True)
class GpuBatch:
    """Rows of one layer, and the tiles that fit them."""

    rows: AlignedBatch
    tiles: MoeTiles
    topk_ids: torch.Tensor  # [T, K]
    lora_batch: LoraBatch | None

    @cached_property
    def row_of_pair(self) -> torch.Tensor:
        """int32 [T * K]: row of each pair of this rank; undefined for others."""
        rows = self.rows
        out = torch.empty(
            rows.num_tokens * rows.top_k, dtype=torch.int32, device=rows.sorted_pairs.device
        )
        if rows.max_blocks:
            invert_kernel[(rows.max_blocks,)](
                rows.sorted_pairs, rows.block_end, rows.num_blocks, out,
                BM=rows.block_size, PDL=USE_PDL, launch_pdl=USE_PDL,
            )  # fmt: skip
        return out


@dataclass(frozen=True)
class HookedBackend(MoeBackend):
    """Plain stages on a GPU. `tiles` overrides the tables and the heuristic."""

    tiles: MoeTiles | None = None

    def align(
        self,
        topk_ids: torch.Tensor,
        lora_batch: LoraBatch | None,
        weights: MoeWeights,
        dtype: torch.dtype | None = None,
    ) -> GpuBatch:
        check_topk_ids(topk_ids, weights.num_experts)
        for name in ("w13", "w2", "w13_bias", "w2_bias", "w13_scale", "w2_scale"):
            check_contiguous(name, getattr(weights, name))
        topk_ids = topk_ids.contiguous()
        num_tokens, top_k = topk_ids.shape
        if lora_batch is not None:
            check_token_slot(lora_batch.token_slot, num_tokens, topk_ids.device)
        tiles = self.tiles
        if tiles is None:
            shape = MoeShape(
                weights.hidden,
                weights.intermediate,
                weights.num_experts,
                top_k,
                dtype or weights.w13.dtype,
                weights.fp8,
            )
            device = device_name(topk_ids.device)
            adapters = 0 if lora_batch is None else lora_batch.num_adapters
            tiles = choose(shape, num_tokens, device, adapters)
        rows = align(topk_ids, lora_batch, tiles.block_m, weights.num_experts)
        return GpuBatch(rows, tiles, topk_ids, lora_batch)

    def gate_up(self, x: torch.Tensor, weights: MoeWeights, batch: GpuBatch) -> torch.Tensor:
        rows = batch.rows
        x = rows_of_x(x, rows)
        h = x.new_empty(rows.max_blocks * rows.block_size, weights.w13.shape[1])
        tile = batch.tiles.gate_up
        grouped_gemm(
            x, weights.w13, weights.w13_scale, weights.w13_bias, h, rows, tile, by_token=True
        )
        return h

    def lora_gate_up_(
        self, h: torch.Tensor, x: torch.Tensor, batch: GpuBatch, tables: ExpertLoraTables
    ) -> None:
        check_tables(tables, batch.rows, x.device)
        x = rows_of_x(x, batch.rows)
        half = h.shape[1] // 2
        shrunk = shrink_gate_up(x, half, batch.rows, tables, batch.tiles.shrink_gate_up)
        expand_(h, shrunk, batch.rows, (half, half), by_token=False)

    def activate(self, h: torch.Tensor, weights: MoeWeights) -> torch.Tensor:
        rows, columns = h.shape
        a = h.new_empty(rows, columns // 2)
        clamped = weights.clamped
        if rows:
            block = min(1024, next_power_of_2(columns // 2))
            grid = (rows, cdiv(columns // 2, block))
            _activate_kernel[grid](
                h, a, columns // 2, h.stride(0), a.stride(0),
                1.0 if clamped is None else clamped.alpha,
                1.0 if clamped is None else clamped.limit,
                CLAMPED=clamped is not None, BLOCK=block, PDL=USE_PDL, launch_pdl=USE_PDL,
            )  # fmt: skip
        return a

    def down(self, a: torch.Tensor, weights: MoeWeights, batch: GpuBatch) -> torch.Tensor:
        y = a.new_empty(a.shape[0], weights.hidden)
        tile = batch.tiles.down
        grouped_gemm(a, weights.w2, weights.w2_scale, weights.w2_bias, y, batch.rows, tile)
        return y

    def lora_down_(
        self, y: torch.Tensor, a: torch.Tensor, batch: GpuBatch, tables: ExpertLoraTables
    ) -> None:
        check_tables(tables, batch.rows, a.device)
        shrunk = shrink_down(a, batch.rows, tables, batch.tiles.shrink_down)
        expand_(y, shrunk, batch.rows, (y.shape[1],), by_token=False)

    def combine(
        self,
        y: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        batch: GpuBatch,
    ) -> torch.Tensor:
        weights = topk_weights.contiguous()
        return combine(y, batch.topk_ids, batch.rows, batch.row_of_pair, weights)


def rows_of_x(x: torch.Tensor, rows: AlignedBatch) -> torch.Tensor:
    """x [T, H] with each row's elements side by side."""
    check("x", x, shape=(rows.num_tokens, None))
    return x if x.stride(1) == 1 else x.contiguous()


def check_tables(tables: ExpertLoraTables, rows: AlignedBatch, device: torch.device) -> None:
    """Raise ValueError, naming the table, unless the kernels read it right."""
    tables.check(rows.num_experts, device)
    for name in ("pool", "offset_a13", "offset_b13", "offset_a2", "offset_b2", "rank", "scale"):
        check_contiguous(f"tables.{name}", getattr(tables, name))
    check_contiguous("tables.layout", tables.layout)


def grouped_gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    rows: AlignedBatch,
    tile: GemmTile,
    *,
    by_token: bool = False,
    topk_weights: torch.Tensor | None = None,
    shrunk: Shrunk | None = None,
) -> None:
    """out = x W^T by expert; with `shrunk`, the down projection's LoRA is added in.

    With topk_weights [T, K], out is [T * K, N], written by pair and weighted. FP8 weights come with
    their scale.
    """
    _, columns, inner = w.shape
    tiles_n = cdiv(columns, tile.block_n)
    grid = (grid_size(rows.max_blocks * tiles_n, tile, x.device),)
    if grid[0] == 0:
        return
    grouped_gemm_kernel[grid](
        x, w, x if scale is None else scale, x if bias is None else bias,
        x if topk_weights is None else topk_weights, out,
        *batch_args(rows), *expand_args(shrunk, rows.num_blocks),
        inner, columns, rows.top_k, x.stride(0), out.stride(0),
        0 if by_token or not uses_tma(w, tile) else row_tiles(x, tile, rows.block_size),
        weight_tiles(w, tile),
        BY_TOKEN=by_token, TO_PAIR=topk_weights is not None, **expand_flags(shrunk, tile),
        BIAS=bias is not None, **gemm_flags(tile, rows, w, columns),
    )  # fmt: skip


def uses_tma(w: torch.Tensor, tile: GemmTile) -> bool:
    """Steps have to be whole: rows of x are read without a bound on the inner dimension. FP8 takes
    its way to the tensor cores through registers."""
    return tile.tma and w.shape[2] % tile.block_k == 0 and w.dtype != FP8


def weight_tiles(w: torch.Tensor, tile: GemmTile) -> TensorDescriptor | int:
    """w [E, N, inner] for the copy engine, all experts' rows under each other."""
    if not uses_tma(w, tile):
        return 0
    return TensorDescriptor.from_tensor(w.flatten(0, 1), [tile.block_n, tile.block_k])


def row_tiles(x: torch.Tensor, tile: GemmTile, block_m: int) -> TensorDescriptor:
    """x [rows, inner] for the copy engine, by blocks."""
    return TensorDescriptor.from_tensor(x, [block_m, tile.block_k])


def gemm_flags(tile: GemmTile, rows: AlignedBatch, w: torch.Tensor, columns: int) -> dict:
    """A grouped GEMM's compile-time sizes and launch options; w [E, N, inner].

    Raises:
        ValueError: w is FP8 and a step of the tile would reach over several of its blocks.
    """
    inner = w.shape[2]
    if w.dtype == FP8 and FP8_BLOCK % tile.block_k:
        raise ValueError(
            f"tiles of FP8 weights must have a block_k that divides {FP8_BLOCK}, got {tile.block_k}"
        )
    return {
        "FP8": w.dtype == FP8,
        "EVEN": inner % tile.block_k == 0 and columns % tile.block_n == 0,
        "TMA": uses_tma(w, tile),
        "BM": rows.block_size,
        "BN": tile.block_n,
        "BK": tile.block_k,
        "SHORT": tile.short and rows.block_size >= 64,
        "PDL": USE_PDL,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "launch_pdl": USE_PDL,
    }


def combine(
    y: torch.Tensor,
    topk_ids: torch.Tensor,
    rows: AlignedBatch,
    row_of_pair: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of each token's pairs, [T, H]; y by pair, or by row with `row_of_pair` and weights."""
    hidden = y.shape[1]
    out = y.new_empty(rows.num_tokens, hidden)
    if out.numel() == 0:
        return out
    block = min(512 if rows.num_tokens <= 512 else 1024, next_power_of_2(hidden))
    combine_kernel[(rows.num_tokens, cdiv(hidden, block))](
        y, topk_ids, topk_ids if row_of_pair is None else row_of_pair,
        y if topk_weights is None else topk_weights, out,
        hidden, rows.top_k, rows.num_experts, y.stride(0), out.stride(0),
        BY_ROW=row_of_pair is not None, KP=next_power_of_2(rows.top_k), BH=block, PDL=USE_PDL,
        num_warps=4, launch_pdl=USE_PDL,
    )  # fmt: skip
    return out


def grid_size(tiles: int, tile: GemmTile, device: torch.device) -> int:
    """Programs of a grouped GEMM of at most `tiles` tiles."""
    if tile.persistent == 0 or device.type != "cuda":
        return tiles
    return min(tiles, tile.persistent * _processors(device))


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _activate_kernel(
    h, a, columns, h_stride, a_stride, alpha, limit,
    CLAMPED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl_wait(PDL)
    pdl_launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(h + row * h_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h + row * h_stride + columns + column, mask=inside, other=0.0).to(tl.float32)
    value = swiglu(gate, up, alpha, limit, CLAMPED)
    tl.store(a + row * a_stride + column, value.to(a.dtype.element_ty), mask=inside)
