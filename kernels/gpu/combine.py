"""Sum each token's top-k rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import pdl_launch_dependents, pdl_wait


@triton.jit
def combine_kernel(
    y, topk_ids, row_of_pair, weights, out, hidden, top_k, num_experts, y_stride, out_stride,
    BY_ROW: tl.constexpr, KP: tl.constexpr, BH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T, H] = the sum over k of y, without pairs of other ranks.

    y is [T * K, H] by pair, weighted already; BY_ROW, it is [rows, H] and to be weighted.
    """
    pdl_wait(PDL)
    pdl_launch_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BH + tl.arange(0, BH)
    k = tl.arange(0, KP)
    pair = token * top_k + k
    expert = tl.load(topk_ids + pair, mask=k < top_k, other=-1)
    here = (expert >= 0) & (expert < num_experts)
    row = pair
    if BY_ROW:
        row = tl.load(row_of_pair + pair, mask=here, other=0).to(tl.int64)
    place = y + row[:, None] * y_stride + column[None, :]
    rows = tl.load(place, mask=here[:, None] & (column < hidden)[None, :], other=0.0)
    rows = rows.to(tl.float32)
    if BY_ROW:
        rows *= tl.load(weights + pair, mask=here, other=0.0).to(tl.float32)[:, None]
    total = tl.sum(rows, 0)
    tl.store(
        out + token * out_stride + column, total.to(out.dtype.element_ty), mask=column < hidden
    )


@triton.jit
def invert_kernel(
    sorted_pairs, block_end, num_blocks, row_of_pair, BM: tl.constexpr, PDL: tl.constexpr
):
    """row_of_pair [T * K]: where each pair of this rank stands."""
    block = tl.program_id(0)
    pdl_wait(PDL)
    pdl_launch_dependents(PDL)
    if block < tl.load(num_blocks):
        row = block * BM + tl.arange(0, BM)
        here = row < tl.load(block_end + block)
        pair = tl.load(sorted_pairs + row, mask=here, other=0)
        tl.store(row_of_pair + pair, row, mask=here)
