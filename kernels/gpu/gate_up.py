"""The first grouped GEMM of a MoE layer: gate and up products, LoRA, and SwiGLU in one kernel.

After the base product each tile adds its segments' s B^T to the accumulators, so that the
intermediate is written once and never read back for LoRA's sake. A tile starts on the base weights
while the shrink before it still runs, and waits for it only where it needs s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .expand import segment_rows
from .launch import pdl_launch_dependents, pdl_wait


@triton.jit
def swiglu(gate, up, alpha, limit, CLAMPED: tl.constexpr):
    """silu(gate) * up, or gpt-oss's clamped form: (up + 1) * gate * sigmoid(alpha * gate)."""
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        return (up + 1.0) * gate * tl.sigmoid(alpha * gate)
    else:
        return gate * tl.sigmoid(gate) * up


@triton.jit
def gate_up_kernel(
    x, w13, bias, out,
    sorted_pairs, block_expert, block_end, num_blocks,
    segment_count, segment_slot, segment_first,
    pool, offset_a, offset_b, ranks, scales, layout, s,
    hidden, intermediate, top_k, table_columns, x_stride, out_stride, s_stride, split_stride,
    alpha, limit,
    FUSED_BIT: tl.constexpr, LORA: tl.constexpr, ALIGNED: tl.constexpr, SPLITS: tl.constexpr,
    RC: tl.constexpr, BIAS: tl.constexpr, CLAMPED: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [rows, I]; x [T, H], w13 [E, 2I, H]. Programs walk the tiles that there are."""
    if not LORA:
        pdl_wait(PDL)
        pdl_launch_dependents(PDL)
    tiles_n = tl.cdiv(intermediate, BN)
    # What the align wrote is read past the first-level cache: this program may have started while
    # the shrink still ran, without the barrier that a launch is.
    tiles = tl.load(num_blocks, cache_modifier=".cg") * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        block = tile // tiles_n
        n = tile % tiles_n * BN + tl.arange(0, BN)
        k_in_tile = tl.arange(0, BK)
        expert = tl.load(block_expert + block, cache_modifier=".cg").to(tl.int64)
        end_row = tl.load(block_end + block, cache_modifier=".cg")
        row = block * BM + tl.arange(0, BM)
        here = row < end_row
        pair = tl.load(sorted_pairs + row, mask=here, other=0, cache_modifier=".cg")
        x_row = x + (pair // top_k).to(tl.int64)[:, None] * x_stride
        w_gate = w13 + (expert * 2 * intermediate + n)[None, :] * hidden
        gate = tl.zeros([BM, BN], tl.float32)
        up = tl.zeros([BM, BN], tl.float32)
        for k0 in range(0, hidden, BK):
            k = k0 + k_in_tile
            if EVEN:
                xs = tl.load(x_row + k[None, :], mask=here[:, None], other=0.0)
                wg = tl.load(w_gate + k[:, None])
                wu = tl.load(w_gate + intermediate.to(tl.int64) * hidden + k[:, None])
            else:
                inside = (k < hidden)[:, None] & (n < intermediate)[None, :]
                xs = tl.load(
                    x_row + k[None, :], mask=here[:, None] & (k < hidden)[None, :], other=0.0
                )
                wg = tl.load(w_gate + k[:, None], mask=inside, other=0.0)
                up_part = intermediate.to(tl.int64) * hidden
                wu = tl.load(w_gate + up_part + k[:, None], mask=inside, other=0.0)
            gate = tl.dot(xs, wg, gate, input_precision="ieee")
            up = tl.dot(xs, wu, up, input_precision="ieee")
        if LORA:
            pdl_wait(PDL)
            count = tl.load(segment_count + block)
            for nth in range(0, count):
                first, end = segment_rows(block, nth, count, end_row, segment_first, BM)
                slot = tl.load(segment_slot + block * BM + nth)
                entry = slot.to(tl.int64) * table_columns + expert
                a = tl.load(offset_a + entry)
                b = tl.load(offset_b + entry)
                rank_gate = tl.load(ranks + entry * 3)
                rank_up = tl.load(ranks + entry * 3 + 1)
                scale_gate = tl.load(scales + entry * 3)
                scale_up = tl.load(scales + entry * 3 + 1)
                fused = (tl.load(layout + slot) & FUSED_BIT) != 0
                adapted = (a >= 0) & (b >= 0)
                rank_gate = tl.where(adapted, rank_gate, 0)
                rank_up = tl.where(adapted, rank_up, 0)
                if ALIGNED:  # lets the compiler see that 16-byte loads are right
                    b = b // 8 * 8
                    rank_gate = rank_gate // 8 * 8
                    rank_up = rank_up // 8 * 8
                mine = (row >= first) & (row < end)
                s_gate = s + row.to(tl.int64)[:, None] * s_stride
                s_up = s_gate + tl.where(fused, 0, rank_gate)
                b_gate = pool + b + n.to(tl.int64)[None, :] * rank_gate
                b_up = pool + b + intermediate.to(tl.int64) * rank_gate
                b_up += n.to(tl.int64)[None, :] * rank_up
                # Gate and up side by side: their loads are in flight together.
                for first_r in range(0, tl.maximum(rank_gate, rank_up), RC):
                    r = first_r + tl.arange(0, RC)
                    r_gate = r < rank_gate
                    r_up = r < rank_up
                    inside = mine[:, None] & r_gate[None, :]
                    sg = tl.load(s_gate + r[None, :], mask=inside, other=0.0)
                    for split in tl.static_range(1, SPLITS):
                        part = s_gate + split * split_stride + r[None, :]
                        sg += tl.load(part, mask=inside, other=0.0)
                    inside = mine[:, None] & r_up[None, :]
                    su = tl.load(s_up + r[None, :], mask=inside, other=0.0)
                    for split in tl.static_range(1, SPLITS):
                        part = s_up + split * split_stride + r[None, :]
                        su += tl.load(part, mask=inside, other=0.0)
                    columns = (n < intermediate)[None, :]
                    bg = tl.load(b_gate + r[:, None], mask=r_gate[:, None] & columns, other=0.0)
                    bu = tl.load(b_up + r[:, None], mask=r_up[:, None] & columns, other=0.0)
                    dtype = x.dtype.element_ty
                    gate = tl.dot(
                        (sg * scale_gate).to(dtype), bg.to(dtype), gate, input_precision="ieee"
                    )
                    up = tl.dot((su * scale_up).to(dtype), bu.to(dtype), up, input_precision="ieee")
        if BIAS:
            bias_gate = bias + expert * 2 * intermediate + n
            gate += tl.load(bias_gate, mask=n < intermediate, other=0.0).to(tl.float32)[None, :]
            bias_up = tl.load(bias_gate + intermediate, mask=n < intermediate, other=0.0)
            up += bias_up.to(tl.float32)[None, :]
        act = swiglu(gate, up, alpha, limit, CLAMPED)
        place = out + row.to(tl.int64)[:, None] * out_stride + n[None, :]
        inside = here[:, None] & (n < intermediate)[None, :]
        tl.store(place, act.to(out.dtype.element_ty), mask=inside)
    if LORA:
        pdl_wait(PDL)  # also programs that found no tile
        pdl_launch_dependents(PDL)
