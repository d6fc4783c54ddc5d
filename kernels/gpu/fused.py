"""The fast backend: LoRA and SwiGLU inside the grouped GEMMs, routing weights in the second one."""

from __future__ import annotations

import torch

from ..lora_tables import SHARED_A13, SHARED_B2, ExpertLoraTables
from ..moe_weights import MoeWeights
from ..runner import Hooks
from .gate_up import gate_up_kernel
from .hooked import (
    GpuBatch,
    HookedBackend,
    check_tables,
    combine,
    gemm_flags,
    grid_size,
    grouped_gemm,
    rows_of_x,
    weight_tiles,
)
from .launch import cdiv
from .lora import Shrunk, batch_args, expand_args, expand_flags, shrink_down, shrink_gate_up
from .shared_outer import combine_shared, shrink_tokens_


class FusedBackend(HookedBackend):
    """Four launches a layer, and two more (the shrinks) where tokens have adapters."""

    def first_half(
        self,
        x: torch.Tensor,
        weights: MoeWeights,
        batch: GpuBatch,
        lora: ExpertLoraTables | None,
        hooks: Hooks,
    ) -> torch.Tensor:
        if hooks:  # they want to see the products before the activation
            return super().first_half(x, weights, batch, lora, hooks)
        rows, tile, clamped = batch.rows, batch.tiles.gate_up, weights.clamped
        x = rows_of_x(x, rows)
        hidden, intermediate = weights.hidden, weights.intermediate
        a = x.new_empty(rows.max_blocks * rows.block_size, intermediate)
        tiles_n = cdiv(intermediate, tile.block_n)
        grid = (grid_size(rows.max_blocks * tiles_n, tile, x.device),)
        if grid[0] == 0:
            return a
        shrunk = None if lora is None else self.shrunk(x, intermediate, batch, lora)
        gate_up_kernel[grid](
            x, weights.w13, x if weights.w13_scale is None else weights.w13_scale,
            x if weights.w13_bias is None else weights.w13_bias, a,
            *batch_args(rows), *expand_args(shrunk, rows.num_blocks),
            0 if shrunk is None else shrunk.part_stride,
            hidden, intermediate, rows.top_k, x.stride(0), a.stride(0),
            1.0 if clamped is None else clamped.alpha, 1.0 if clamped is None else clamped.limit,
            weight_tiles(weights.w13, tile),
            **expand_flags(shrunk, tile), BIAS=weights.w13_bias is not None,
            CLAMPED=clamped is not None,
            **gemm_flags(tile, rows, weights.w13, intermediate),
        )  # fmt: skip
        return a

    def shrunk(
        self, x: torch.Tensor, intermediate: int, batch: GpuBatch, lora: ExpertLoraTables
    ) -> Shrunk:
        """What gate and up are to add to each row of x's tokens, before B13."""
        rows = batch.rows
        check_tables(lora, rows, x.device)
        shared_bit = SHARED_A13 if lora.shared_outer else 0
        shrunk = shrink_gate_up(x, intermediate, rows, lora, batch.tiles.shrink_gate_up, shared_bit)
        if lora.shared_outer and batch.lora_batch is not None:
            shrink_tokens_(shrunk, x, batch.topk_ids, batch.lora_batch, batch.row_of_pair, lora)
        return shrunk

    def second_half(
        self,
        a: torch.Tensor,
        weights: MoeWeights,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        batch: GpuBatch,
        lora: ExpertLoraTables | None,
        hooks: Hooks,
    ) -> torch.Tensor:
        if hooks:
            return super().second_half(a, weights, topk_weights, topk_ids, batch, lora, hooks)
        rows, topk_ids, topk_weights = batch.rows, batch.topk_ids, topk_weights.contiguous()
        shrunk = None
        if lora is not None and rows.max_blocks:
            shared_bit = SHARED_B2 if lora.shared_outer else 0
            shrunk = shrink_down(a, rows, lora, batch.tiles.shrink_down, shared_bit)
        y = a.new_empty(rows.num_tokens * rows.top_k, weights.hidden)
        grouped_gemm(
            a, weights.w2, weights.w2_scale, weights.w2_bias, y, rows, batch.tiles.down,
            topk_weights=topk_weights, shrunk=shrunk,
        )  # fmt: skip
        if shrunk is not None and lora is not None and lora.shared_outer and batch.lora_batch:
            return combine_shared(
                y, topk_weights, topk_ids, shrunk, batch.lora_batch, batch.row_of_pair, lora
            )
        return combine(y, topk_ids, rows)
