"""The short way for shared-outer adapters: one gate/up A, or one down B, for all experts.

Gate and up are shrunk once per token, not once per pair: `shrink_tokens_kernel` spreads each
token's values over its rows, where the fused product finds them like any others. For down, each
pair's s is weighted and summed over the token's experts before one expand, in
`combine_shared_kernel`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..aligned import AlignedBatch
from ..lora_batch import LoraBatch
from ..lora_tables import FUSED_GATE_UP, SHARED_A13, SHARED_B2, ExpertLoraTables
from .expand import GROUP
from .launch import USE_PDL, cdiv, next_power_of_2, pdl_launch_dependents, pdl_wait
from .lora import TRITON_TYPES, Shrunk, token_blocks
from .shrink import run_rows

_BLOCK = 16  # tokens of a block


def shrink_tokens_(
    shrunk: Shrunk,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    lora_batch: LoraBatch,
    row_of_pair: torch.Tensor,
    tables: ExpertLoraTables,
) -> None:
    """Fill the rows of s whose adapters share one gate/up A; x [T, H], topk_ids [T, K]."""
    tokens = token_blocks(lora_batch, _BLOCK)
    if tokens.segments is None or not tokens.max_blocks:
        return
    shrink_tokens_kernel[(tokens.max_blocks,)](
        x, topk_ids, row_of_pair, *_token_args(tokens),
        tables.pool, tables.offset_a13, tables.rank, tables.scale, tables.layout, shrunk.s,
        x.shape[1], topk_ids.shape[1], tables.rank.shape[1], x.stride(0), shrunk.s.stride(1),
        shrunk.s.stride(0), shrunk.part_stride,
        FUSED_BIT=FUSED_GATE_UP, SHARED_BIT=SHARED_A13, ALIGNED=shrunk.aligned,
        SPLITS=shrunk.splits, EXPERTS=next_power_of_2(tables.rank.shape[1]), BM=_BLOCK, BR=32,
        BK=64, PDL=USE_PDL, num_warps=4, num_stages=3, launch_pdl=USE_PDL,
    )  # fmt: skip


def combine_shared(
    y: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    shrunk: Shrunk,
    lora_batch: LoraBatch,
    row_of_pair: torch.Tensor,
    tables: ExpertLoraTables,
) -> torch.Tensor:
    """Each token's pairs and its adapter's shared part, [T, H]; y [T * K, H], weighted."""
    num_tokens, top_k = topk_ids.shape
    out = y.new_empty(num_tokens, y.shape[1])
    tokens = token_blocks(lora_batch, _BLOCK)
    if tokens.segments is None or not tokens.max_blocks:
        return out
    block_h = min(128, next_power_of_2(y.shape[1]))
    combine_shared_kernel[(tokens.max_blocks, cdiv(y.shape[1], block_h))](
        y, topk_weights, topk_ids, row_of_pair, *_token_args(tokens),
        tables.pool, tables.offset_a2, tables.offset_b2, tables.rank, tables.layout, shrunk.s, out,
        y.shape[1], top_k, tables.rank.shape[1], y.stride(0), out.stride(0), shrunk.s.stride(1),
        shrunk.s.stride(0),
        SHARED_BIT=SHARED_B2, ALIGNED=shrunk.aligned, SPLITS=shrunk.splits,
        EXPERTS=next_power_of_2(tables.rank.shape[1]), DTYPE=TRITON_TYPES[y.dtype], BM=_BLOCK,
        BH=block_h, PDL=USE_PDL, num_warps=4, launch_pdl=USE_PDL,
    )  # fmt: skip
    return out


def _token_args(tokens: AlignedBatch) -> tuple[torch.Tensor, ...]:
    assert tokens.segments is not None
    return (
        tokens.sorted_pairs, tokens.block_end, tokens.num_blocks,
        tokens.segments.count, tokens.segments.slot, tokens.segments.first_row,
    )  # fmt: skip


@triton.jit
def _shared_entry(offsets, slot, num_experts, EXPERTS: tl.constexpr):
    """The factor that all experts of a slot share, and an expert that has it; offset -1: none."""
    expert = tl.arange(0, EXPERTS)
    place = offsets + slot.to(tl.int64) * num_experts + expert
    found = tl.load(place, mask=expert < num_experts, other=-1)
    offset = tl.max(found, 0)
    return offset, tl.max(tl.where(found == offset, expert, 0), 0)


@triton.jit
def shrink_tokens_kernel(
    x, topk_ids, row_of_pair,
    block_tokens, block_end, num_blocks, segment_count, segment_slot, segment_first,
    pool, offset_a, ranks, scales, layout, s,
    inner, top_k, num_experts, x_stride, s_stride, split_stride, part_stride,
    FUSED_BIT: tl.constexpr, SHARED_BIT: tl.constexpr, ALIGNED: tl.constexpr,
    SPLITS: tl.constexpr, EXPERTS: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: a block of tokens in the order by slot."""
    block = tl.program_id(0)
    pdl_wait(PDL)
    pdl_launch_dependents(PDL)
    if block >= tl.load(num_blocks):
        return
    end_row = tl.load(block_end + block)
    count = tl.load(segment_count + block)
    place = block * BM + tl.arange(0, BM)
    token = tl.load(block_tokens + place, mask=place < end_row, other=0)
    x_row = x + token.to(tl.int64)[:, None] * x_stride
    for nth in range(0, count):
        slot = tl.load(segment_slot + block * BM + nth)
        if (tl.load(layout + slot) & SHARED_BIT) != 0:
            first, end = run_rows(nth, count, end_row, segment_first + block * BM)
            mine = (place >= first) & (place < end)
            a, any_expert = _shared_entry(offset_a, slot, num_experts, EXPERTS)
            entry = slot.to(tl.int64) * num_experts + any_expert
            gate = tl.load(ranks + entry * 3)
            up = tl.load(ranks + entry * 3 + 1)
            fused = (tl.load(layout + slot) & FUSED_BIT) != 0
            rank = tl.where(fused, tl.maximum(gate, up), gate + up)
            rank = tl.where(a >= 0, rank, 0)
            if ALIGNED:  # lets the compiler see that 16-byte loads are right
                a = a // 8 * 8
            for first_r in range(0, rank, BR):
                r = first_r + tl.arange(0, BR)
                acc = tl.zeros([BM, BR], tl.float32)
                for k0 in range(0, inner, BK):
                    k = k0 + tl.arange(0, BK)
                    inside = mine[:, None] & (k < inner)[None, :]
                    xs = tl.load(x_row + k[None, :], mask=inside, other=0.0)
                    factor = pool + a + r.to(tl.int64)[None, :] * inner + k[:, None]
                    inside = (k < inner)[:, None] & (r < rank)[None, :]
                    factors = tl.load(factor, mask=inside, other=0.0).to(xs.dtype)
                    acc = tl.dot(xs, factors, acc, input_precision="ieee")
                dtype = s.dtype.element_ty
                up_r = tl.where(fused, r, r - gate)
                for nth_k in range(0, top_k):
                    pair = token * top_k + nth_k
                    expert = tl.load(topk_ids + pair, mask=mine, other=-1).to(tl.int32)
                    here = (expert >= 0) & (expert < num_experts)
                    row = tl.load(row_of_pair + pair, mask=here, other=0).to(tl.int64)
                    mine_entry = slot.to(tl.int64) * num_experts + expert
                    scale = tl.load(scales + mine_entry * 3, mask=here, other=0.0)
                    scale_up = tl.load(scales + mine_entry * 3 + 1, mask=here, other=0.0)
                    to_gate = here[:, None] & (r < gate)[None, :]
                    to_up = here[:, None] & ((up_r >= 0) & (up_r < up) & (r < rank))[None, :]
                    gate_at = s + row[:, None] * s_stride + r[None, :]
                    up_at = s + row[:, None] * s_stride + part_stride + up_r[None, :]
                    tl.store(gate_at, (acc * scale[:, None]).to(dtype), mask=to_gate)
                    tl.store(up_at, (acc * scale_up[:, None]).to(dtype), mask=to_up)
                    for split in tl.static_range(1, SPLITS):  # the sum is whole already
                        nothing = tl.zeros([BM, BR], dtype)
                        tl.store(gate_at + split * split_stride, nothing, mask=to_gate)
                        tl.store(up_at + split * split_stride, nothing, mask=to_up)


@triton.jit
def combine_shared_kernel(
    y, weights, topk_ids, row_of_pair,
    block_tokens, block_end, num_blocks, segment_count, segment_slot, segment_first,
    pool, offset_a, offset_b, ranks, layout, s, out,
    hidden, top_k, num_experts, y_stride, out_stride, s_stride, split_stride,
    SHARED_BIT: tl.constexpr, ALIGNED: tl.constexpr, SPLITS: tl.constexpr, EXPERTS: tl.constexpr,
    DTYPE: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: a block of tokens in the order by slot, a tile of columns."""
    block = tl.program_id(0)
    pdl_wait(PDL)
    pdl_launch_dependents(PDL)
    if block >= tl.load(num_blocks):
        return
    end_row = tl.load(block_end + block)
    count = tl.load(segment_count + block)
    place = block * BM + tl.arange(0, BM)
    there = place < end_row
    token = tl.load(block_tokens + place, mask=there, other=0)
    n = tl.program_id(1) * BH + tl.arange(0, BH)
    acc = tl.zeros([BM, BH], tl.float32)
    for nth_k in range(0, top_k):
        pair = token * top_k + nth_k
        expert = tl.load(topk_ids + pair, mask=there, other=-1).to(tl.int32)
        here = (expert >= 0) & (expert < num_experts)
        row = y + pair.to(tl.int64)[:, None] * y_stride + n[None, :]
        rows = tl.load(row, mask=here[:, None] & (n < hidden)[None, :], other=0.0)
        acc += rows.to(tl.float32)
    for nth in range(0, count):
        slot = tl.load(segment_slot + block * BM + nth)
        if (tl.load(layout + slot) & SHARED_BIT) != 0:
            first, end = run_rows(nth, count, end_row, segment_first + block * BM)
            mine = (place >= first) & (place < end)
            b, any_expert = _shared_entry(offset_b, slot, num_experts, EXPERTS)
            rank = tl.load(ranks + (slot.to(tl.int64) * num_experts + any_expert) * 3 + 2)
            rank = tl.where(b >= 0, rank, 0)
            if ALIGNED:  # lets the compiler see that 16-byte loads are right
                b = b // 8 * 8
                rank = rank // 8 * 8
            for first_r in range(0, rank, GROUP):
                r = first_r + tl.arange(0, GROUP)
                total = tl.zeros([BM, GROUP], tl.float32)
                for nth_k in range(0, top_k):
                    pair = token * top_k + nth_k
                    expert = tl.load(topk_ids + pair, mask=mine, other=-1).to(tl.int32)
                    known = (expert >= 0) & (expert < num_experts)
                    entry = slot.to(tl.int64) * num_experts + expert
                    # All under one mask: Triton 3.6 can't compile a load under a mask that another
                    # load has narrowed.
                    a_at = tl.load(offset_a + entry, mask=known, other=-1)
                    b_at = tl.load(offset_b + entry, mask=known, other=-1)
                    weight = tl.load(weights + pair, mask=known, other=0.0).to(tl.float32)
                    row = tl.load(row_of_pair + pair, mask=known, other=0).to(tl.int64)
                    here = known & (a_at >= 0) & (b_at >= 0)
                    inside = here[:, None] & (r < rank)[None, :]
                    for split in tl.static_range(SPLITS):
                        shrunk_at = s + split * split_stride + row[:, None] * s_stride + r[None, :]
                        part = tl.load(shrunk_at, mask=inside, other=0.0).to(tl.float32)
                        total += weight[:, None] * part
                inside = (r < rank)[:, None] & (n < hidden)[None, :]
                factor = pool + b + n.to(tl.int64)[None, :] * rank + r[:, None]
                factors = tl.load(factor, mask=inside, other=0.0).to(DTYPE)
                acc = tl.dot(total.to(DTYPE), factors, acc, input_precision="ieee")
    to = out + token.to(tl.int64)[:, None] * out_stride + n[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=there[:, None] & (n < hidden)[None, :])
