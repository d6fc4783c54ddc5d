"""The first grouped GEMM of a MoE layer: gate and up products, LoRA, and SwiGLU in one kernel.

After the base product each tile adds its adapters' s B^T to the accumulators, so that the
intermediate is written once and never read back for LoRA's sake. A tile starts on the base weights
while the shrink before it still runs, and waits for it only where it needs s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .expand import GROUP, add_groups, load_groups, read_groups, read_list
from .fp8 import BLOCK, block_scale, decode
from .launch import pdl_launch_dependents, pdl_wait


@triton.jit
def swiglu(gate, up, alpha, limit, CLAMPED: tl.constexpr):
    """silu(gate) * up, or gpt-oss's clamped form: (up + 1) * gate * sigmoid(alpha * gate)."""
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        return (up + 1.0) * gate * tl.sigmoid(alpha * gate)
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _gate_up_tile(
    x, w13, w_scale, bias, out, sorted_pairs, expert, block, first_row, end_row, n0,
    pool, s, group_count, groups, row_groups, list_length, part_rows,
    s_stride, split_stride, part_stride,
    hidden, intermediate, top_k, x_stride, out_stride, alpha, limit, w_tiles,
    LORA: tl.constexpr, ALIGNED: tl.constexpr, SPLITS: tl.constexpr, EK: tl.constexpr,
    AHEAD: tl.constexpr, EXPAND_STAGES: tl.constexpr,
    BIAS: tl.constexpr, CLAMPED: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    FP8: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows from `first_row`, BN columns from `n0`."""
    n = n0 + tl.arange(0, BN)
    k_in_tile = tl.arange(0, BK)
    row = first_row + tl.arange(0, ROWS)
    here = row < end_row
    pair = tl.load(sorted_pairs + row, mask=here, other=0, cache_modifier=".cg")
    x_row = x + (pair // top_k).to(tl.int64)[:, None] * x_stride
    w_gate = w13 + (expert * 2 * intermediate + n)[None, :] * hidden
    lists = (group_count, groups, row_groups, list_length, part_rows)
    if AHEAD:
        gate_count, gate_first, gate_end, ga, gb, gc, gd = read_list(row, block * 2, 0, *lists, EK)
        up_count, up_first, up_end, ua, ub, uc, ud = read_list(row, block * 2 + 1, 1, *lists, EK)
        gate_s, gate_b = load_groups(
            s, row, 0, gate_first, gate_end, 0, ga, gb, gc, gd,
            pool, n, intermediate, s_stride, split_stride, ALIGNED, SPLITS, EK,
        )  # fmt: skip
        up_s, up_b = load_groups(
            s, row, part_stride, up_first, up_end, 0, ua, ub, uc, ud,
            pool, n, intermediate, s_stride, split_stride, ALIGNED, SPLITS, EK,
        )  # fmt: skip
    if FP8:  # blocks of gate end where up's begin
        gate_blocks = intermediate // BLOCK * tl.cdiv(hidden, BLOCK)
        gate_scale = w_scale + expert * 2 * gate_blocks
        up_scale = gate_scale + gate_blocks
    gate = tl.zeros([ROWS, BN], tl.float32)
    up = tl.zeros([ROWS, BN], tl.float32)
    for k0 in range(0, hidden, BK):
        k = k0 + k_in_tile
        if TMA:
            xs = tl.load(x_row + k[None, :], mask=here[:, None], other=0.0)
            w_at = (expert * 2 * intermediate).to(tl.int32) + n0
            wg = w_tiles.load([w_at, k0]).T
            wu = w_tiles.load([w_at + intermediate, k0]).T
        elif EVEN:
            xs = tl.load(x_row + k[None, :], mask=here[:, None], other=0.0)
            wg = tl.load(w_gate + k[:, None])
            wu = tl.load(w_gate + intermediate.to(tl.int64) * hidden + k[:, None])
        else:
            inside = (k < hidden)[:, None] & (n < intermediate)[None, :]
            xs = tl.load(x_row + k[None, :], mask=here[:, None] & (k < hidden)[None, :], other=0.0)
            wg = tl.load(w_gate + k[:, None], mask=inside, other=0.0)
            up_part = intermediate.to(tl.int64) * hidden
            wu = tl.load(w_gate + up_part + k[:, None], mask=inside, other=0.0)
        if FP8:
            gate_step = tl.dot(xs, decode(wg, xs.dtype), input_precision="ieee")
            up_step = tl.dot(xs, decode(wu, xs.dtype), input_precision="ieee")
            gate += gate_step * block_scale(gate_scale, n, n0, k0, intermediate, hidden, BN)
            up += up_step * block_scale(up_scale, n, n0, k0, intermediate, hidden, BN)
        else:
            gate = tl.dot(xs, wg, gate, input_precision="ieee")
            up = tl.dot(xs, wu, up, input_precision="ieee")
    if LORA:
        STEP: tl.constexpr = EK // GROUP
        DONE: tl.constexpr = STEP if AHEAD else 0
        dtype = x.dtype.element_ty
        gate_list = groups + block * 2 * list_length
        up_list = gate_list + list_length
        if AHEAD:
            ga, gb, gc, gd = read_groups(gate_list, STEP, gate_count, EK)
            ua, ub, uc, ud = read_groups(up_list, STEP, up_count, EK)
            gate = tl.dot(gate_s.to(dtype), gate_b.to(dtype), gate, input_precision="ieee")
            up = tl.dot(up_s.to(dtype), up_b.to(dtype), up, input_precision="ieee")
        else:
            pdl_wait(PDL)
            gate_count, gate_first, gate_end, ga, gb, gc, gd = read_list(
                row, block * 2, 0, *lists, EK
            )
            up_count, up_first, up_end, ua, ub, uc, ud = read_list(
                row, block * 2 + 1, 1, *lists, EK
            )
        for nth in tl.range(DONE, tl.maximum(gate_count, up_count), STEP, num_stages=EXPAND_STAGES):
            next_gate = read_groups(gate_list, nth + STEP, gate_count, EK)
            next_up = read_groups(up_list, nth + STEP, up_count, EK)
            gate = add_groups(
                gate, s, row, 0, gate_first, gate_end, nth, ga, gb, gc, gd,
                pool, n, intermediate, s_stride, split_stride, ALIGNED, SPLITS, EK, dtype,
            )  # fmt: skip
            up = add_groups(
                up, s, row, part_stride, up_first, up_end, nth, ua, ub, uc, ud,
                pool, n, intermediate, s_stride, split_stride, ALIGNED, SPLITS, EK, dtype,
            )  # fmt: skip
            ga, gb, gc, gd = next_gate
            ua, ub, uc, ud = next_up
    if BIAS:
        bias_gate = bias + expert * 2 * intermediate + n
        gate += tl.load(bias_gate, mask=n < intermediate, other=0.0).to(tl.float32)[None, :]
        bias_up = tl.load(bias_gate + intermediate, mask=n < intermediate, other=0.0)
        up += bias_up.to(tl.float32)[None, :]
    act = swiglu(gate, up, alpha, limit, CLAMPED)
    place = out + row.to(tl.int64)[:, None] * out_stride + n[None, :]
    inside = here[:, None] & (n < intermediate)[None, :]
    tl.store(place, act.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_up_kernel(
    x, w13, w_scale, bias, out,
    sorted_pairs, block_expert, block_end, num_blocks,
    pool, s, group_count, groups, row_groups, list_length, part_rows,
    s_stride, split_stride, part_stride,
    hidden, intermediate, top_k, x_stride, out_stride, alpha, limit,
    w_tiles,
    LORA: tl.constexpr, ALIGNED: tl.constexpr, SPLITS: tl.constexpr, EK: tl.constexpr,
    AHEAD: tl.constexpr, EXPAND_STAGES: tl.constexpr,
    BIAS: tl.constexpr, CLAMPED: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    FP8: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SHORT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [rows, I]; x [T, H], w13 [E, 2I, H]. Programs walk the tiles that there are.

    FP8: w13 is e4m3, w_scale float32 [E, 2I / 128, ceil(H / 128)]; BK divides 128.

    AHEAD: what the first groups of ranks need is read before the base product, which is to wait
    for the shrink at once; else the base product runs beside the end of the shrink.

    SHORT: tiles whose rows fill no more than half of a block are computed at half the height.
    """
    if AHEAD or not LORA:
        pdl_wait(PDL)
        pdl_launch_dependents(PDL)
    tiles_n = tl.cdiv(intermediate, BN)
    # What the align wrote is read past the first-level cache: this program may have started while
    # the shrink still ran, without the barrier that a launch is.
    tiles = tl.load(num_blocks, cache_modifier=".cg") * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        block = tile // tiles_n
        n0 = tile % tiles_n * BN
        expert = tl.load(block_expert + block, cache_modifier=".cg").to(tl.int64)
        end_row = tl.load(block_end + block, cache_modifier=".cg")
        if SHORT and end_row - block * BM <= BM // 2:
            _gate_up_tile(
                x, w13, w_scale, bias, out, sorted_pairs, expert, block, block * BM, end_row, n0,
                pool, s, group_count, groups, row_groups, list_length, part_rows,
                s_stride, split_stride, part_stride,
                hidden, intermediate, top_k, x_stride, out_stride, alpha, limit, w_tiles,
                LORA, ALIGNED, SPLITS, EK, AHEAD, EXPAND_STAGES, BIAS, CLAMPED, EVEN, TMA, FP8,
                BM // 2, BN, BK, PDL,
            )  # fmt: skip
        else:
            _gate_up_tile(
                x, w13, w_scale, bias, out, sorted_pairs, expert, block, block * BM, end_row, n0,
                pool, s, group_count, groups, row_groups, list_length, part_rows,
                s_stride, split_stride, part_stride,
                hidden, intermediate, top_k, x_stride, out_stride, alpha, limit, w_tiles,
                LORA, ALIGNED, SPLITS, EK, AHEAD, EXPAND_STAGES, BIAS, CLAMPED, EVEN, TMA, FP8,
                BM, BN, BK, PDL,
            )  # fmt: skip
    if LORA and not AHEAD:
        pdl_wait(PDL)  # also programs that found no tile
        pdl_launch_dependents(PDL)
