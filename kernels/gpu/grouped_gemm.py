"""A grouped GEMM over a batch's blocks, with or without LoRA added in: one tile, one accumulator.

The fused backend's down projection, and every projection of the backend that leaves LoRA to hooks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .expand import GROUP, add_groups, load_groups, read_groups, read_list
from .fp8 import BLOCK, block_scale, decode
from .launch import pdl_launch_dependents, pdl_wait


@triton.jit
def _tile(
    x, w, w_scale, bias, weights, out, sorted_pairs, expert, block, first_row, end_row, n0,
    pool, s, group_count, groups, row_groups, list_length, part_rows, s_stride, split_stride,
    inner, columns, top_k, x_stride, out_stride, x_tiles, w_tiles,
    BY_TOKEN: tl.constexpr, TO_PAIR: tl.constexpr, LORA: tl.constexpr, ALIGNED: tl.constexpr,
    SPLITS: tl.constexpr, EK: tl.constexpr, AHEAD: tl.constexpr, EXPAND_STAGES: tl.constexpr,
    BIAS: tl.constexpr, EVEN: tl.constexpr, FP8: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows from `first_row`, BN columns from `n0`."""
    n = n0 + tl.arange(0, BN)
    k_in_tile = tl.arange(0, BK)
    row = first_row + tl.arange(0, ROWS)
    here = row < end_row
    source = row
    target = row
    if TO_PAIR:  # read ahead of the product, at whose end they would be waited for
        target = tl.load(sorted_pairs + row, mask=here, other=0, cache_modifier=".cg")
        weight = tl.load(weights + target, mask=here, other=0.0).to(tl.float32)
    if BY_TOKEN:
        pair = tl.load(sorted_pairs + row, mask=here, other=0, cache_modifier=".cg")
        source = pair // top_k
    x_row = x + source.to(tl.int64)[:, None] * x_stride
    w_row = w + (expert * columns + n)[None, :] * inner
    lists = (group_count, groups, row_groups, list_length, part_rows)
    if AHEAD:
        count, first, end, ga, gb, gc, gd = read_list(row, block, 0, *lists, EK)
        shrunk, factors = load_groups(
            s, row, 0, first, end, 0, ga, gb, gc, gd,
            pool, n, columns, s_stride, split_stride, ALIGNED, SPLITS, EK,
        )  # fmt: skip
    if FP8:
        scale = w_scale + expert * tl.cdiv(columns, BLOCK) * tl.cdiv(inner, BLOCK)
    acc = tl.zeros([ROWS, BN], tl.float32)
    for k0 in range(0, inner, BK):
        k = k0 + k_in_tile
        if TMA:
            if BY_TOKEN or ROWS != BM:
                xs = tl.load(x_row + k[None, :], mask=here[:, None], other=0.0)
            else:  # rows beyond the block's end hold anything, and aren't written
                xs = x_tiles.load([first_row, k0])
            ws = w_tiles.load([(expert * columns).to(tl.int32) + n0, k0]).T
        elif EVEN:
            xs = tl.load(x_row + k[None, :], mask=here[:, None], other=0.0)
            ws = tl.load(w_row + k[:, None])
        else:
            inside = here[:, None] & (k < inner)[None, :]
            xs = tl.load(x_row + k[None, :], mask=inside, other=0.0)
            inside = (k < inner)[:, None] & (n < columns)[None, :]
            ws = tl.load(w_row + k[:, None], mask=inside, other=0.0)
        if FP8:
            step = tl.dot(xs, decode(ws, xs.dtype), input_precision="ieee")
            acc += step * block_scale(scale, n, n0, k0, columns, inner, BN)
        else:
            acc = tl.dot(xs, ws, acc, input_precision="ieee")
    if LORA:
        STEP: tl.constexpr = EK // GROUP
        DONE: tl.constexpr = STEP if AHEAD else 0
        dtype = x.dtype.element_ty
        if AHEAD:
            ga, gb, gc, gd = read_groups(groups + block * list_length, STEP, count, EK)
            acc = tl.dot(shrunk.to(dtype), factors.to(dtype), acc, input_precision="ieee")
        else:
            pdl_wait(PDL)
            count, first, end, ga, gb, gc, gd = read_list(row, block, 0, *lists, EK)
        for nth in tl.range(DONE, count, STEP, num_stages=EXPAND_STAGES):
            following = read_groups(groups + block * list_length, nth + STEP, count, EK)
            acc = add_groups(
                acc, s, row, 0, first, end, nth, ga, gb, gc, gd,
                pool, n, columns, s_stride, split_stride, ALIGNED, SPLITS, EK, dtype,
            )  # fmt: skip
            ga, gb, gc, gd = following
    if BIAS:
        added = tl.load(bias + expert * columns + n, mask=n < columns, other=0.0)
        acc += added.to(tl.float32)[None, :]
    if TO_PAIR:
        acc *= weight[:, None]
    place = out + target.to(tl.int64)[:, None] * out_stride + n[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=here[:, None] & (n < columns)[None, :])


@triton.jit
def grouped_gemm_kernel(
    x, w, w_scale, bias, weights, out,
    sorted_pairs, block_expert, block_end, num_blocks,
    pool, s, group_count, groups, row_groups, list_length, part_rows, s_stride, split_stride,
    inner, columns, top_k, x_stride, out_stride, x_tiles, w_tiles,
    BY_TOKEN: tl.constexpr, TO_PAIR: tl.constexpr, LORA: tl.constexpr, ALIGNED: tl.constexpr,
    SPLITS: tl.constexpr, EK: tl.constexpr, AHEAD: tl.constexpr, EXPAND_STAGES: tl.constexpr,
    BIAS: tl.constexpr, EVEN: tl.constexpr, FP8: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SHORT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [rows or pairs, N]; w [E, N, inner].

    BY_TOKEN: x is [T, inner], read by each row's token; else [rows, inner].
    TO_PAIR: out is [T * K, N], written by pair and multiplied by the pair's routing weight.
    AHEAD, SHORT: as in `gate_up_kernel`.
    FP8: as there; w_scale is [E, ceil(N / 128), ceil(inner / 128)].
    """
    if AHEAD or not LORA:
        pdl_wait(PDL)
        pdl_launch_dependents(PDL)
    tiles_n = tl.cdiv(columns, BN)
    tiles = tl.load(num_blocks, cache_modifier=".cg") * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        block = tile // tiles_n
        n0 = tile % tiles_n * BN
        expert = tl.load(block_expert + block, cache_modifier=".cg").to(tl.int64)
        end_row = tl.load(block_end + block, cache_modifier=".cg")
        if SHORT and end_row - block * BM <= BM // 2:
            _tile(
                x, w, w_scale, bias, weights, out,
                sorted_pairs, expert, block, block * BM, end_row, n0,
                pool, s, group_count, groups, row_groups, list_length, part_rows,
                s_stride, split_stride,
                inner, columns, top_k, x_stride, out_stride, x_tiles, w_tiles,
                BY_TOKEN, TO_PAIR, LORA, ALIGNED, SPLITS, EK, AHEAD, EXPAND_STAGES,
                BIAS, EVEN, FP8, TMA, BM, BM // 2, BN, BK, PDL,
            )  # fmt: skip
        else:
            _tile(
                x, w, w_scale, bias, weights, out,
                sorted_pairs, expert, block, block * BM, end_row, n0,
                pool, s, group_count, groups, row_groups, list_length, part_rows,
                s_stride, split_stride,
                inner, columns, top_k, x_stride, out_stride, x_tiles, w_tiles,
                BY_TOKEN, TO_PAIR, LORA, ALIGNED, SPLITS, EK, AHEAD, EXPAND_STAGES,
                BIAS, EVEN, FP8, TMA, BM, BM, BN, BK, PDL,
            )  # fmt: skip
    if LORA and not AHEAD:
        pdl_wait(PDL)  # also programs that found no tile
        pdl_launch_dependents(PDL)
