"""Attention over a paged KV cache: the kernels.

A sequence's queries are rows: row r is head r % G of its new token r // G, for the G query heads
of one KV head. A program takes BM rows and walks the keys that any of them sees. A decode
sequence is the case of one token, so one kernel serves both; there, programs may also share
the keys (flash-decoding), and `reduce_kernel` puts their parts together.

Softmax is online, in float32 and base 2. A row that has seen nothing has the finite peak NOTHING,
so no difference of infinities arises.

Columns are powers of two: D = D1 + D2 of them are two parts of a key, the second one padded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import pdl_launch_dependents, pdl_wait

NOTHING = tl.constexpr(-1e30)  # below all logits
LOG2_E = tl.constexpr(1.4426950408889634)
REDUCED_AT_ONCE = tl.constexpr(16)  # parts


@triton.jit
def _rows(row, here, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """[N, BLOCK] values at the pointers row [N]; zeros in columns from WIDTH on, and where MASKED
    in rows that aren't `here`."""
    column = tl.arange(0, BLOCK)
    place = row[:, None] + column[None, :]
    if BLOCK > WIDTH:
        inside = (column < WIDTH)[None, :]
        if MASKED:
            inside = inside & here[:, None]
        return tl.load(place, mask=inside, other=0.0)
    elif MASKED:  # noqa: RET505
        return tl.load(place, mask=here[:, None], other=0.0)
    else:
        return tl.load(place)


@triton.jit
def _walk(
    acc, total, peak, q1, q2, position, begin, end, table, k_cache, v_cache, scale, window,
    k_block_stride, k_token_stride, v_block_stride, v_token_stride,
    D1: tl.constexpr, D2: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    KEYS_ARE_VALUES: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Keys begin..end of a sequence join the softmax of the rows.

    They are a multiple of BN, or none of the rows sees a key from `end` on. Not MASKED, they are a
    multiple of BN and every row sees all of them.
    """
    for first in range(begin, end, BN):
        key = first + tl.arange(0, BN)
        here = key < end
        if MASKED:
            block = tl.load(table + key // BLOCK_SIZE, mask=here, other=0).to(tl.int64)
        else:
            block = tl.load(table + key // BLOCK_SIZE).to(tl.int64)
        offset = key % BLOCK_SIZE
        k_row = k_cache + block * k_block_stride + offset * k_token_stride
        k1 = _rows(k_row, here, D, D1, MASKED)
        logits = tl.dot(q1, k1.T, input_precision="ieee")
        if D2 > 0:
            k2 = _rows(k_row + D1, here, D - D1, D2, MASKED)
            logits = tl.dot(q2, k2.T, logits, input_precision="ieee")
        logits *= scale
        if MASKED:
            seen = key[None, :] <= position[:, None]
            if WINDOW:
                seen = seen & (key[None, :] > position[:, None] - window)
            logits = tl.where(seen, logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        p = tl.exp2(logits - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        if KEYS_ARE_VALUES:
            acc = tl.dot(p.to(k1.dtype), k1, acc, input_precision="ieee")
        else:
            v_row = v_cache + block * v_block_stride + offset * v_token_stride
            v = _rows(v_row, here, DV, DVP, MASKED)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        peak = new_peak
    return acc, total, peak


@triton.jit
def _share_out(
    keys, splits, short_splits, LONG: tl.constexpr, MIN_SHARE: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Keys that each program takes of a decode sequence's, and how many programs take some: one
    for a sequence without any. Not more than `short_splits` up to LONG keys, else `splits`."""
    among = tl.where(keys > LONG, splits, short_splits)
    share = tl.maximum(tl.cdiv(keys, among), MIN_SHARE)
    share = tl.cdiv(share, BN) * BN
    return share, tl.maximum(tl.cdiv(keys, share), 1)


@triton.jit(do_not_specialize=["short_splits"])
def attention_kernel(
    q, k_cache, v_cache, sinks, out, part_acc, part_stats,
    blocks, block_start, query_start, seq_lens, items, scale, window, heads, short_splits,
    q_token_stride, q_head_stride, k_block_stride, k_token_stride, k_head_stride,
    v_block_stride, v_token_stride, v_head_stride,
    G: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, KEYS_ARE_VALUES: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    DECODE: tl.constexpr, TWO_LOOPS: tl.constexpr, SPLIT: tl.constexpr, LONG: tl.constexpr,
    MIN_SHARE: tl.constexpr, TILE_TOKENS: tl.constexpr, ROW_TILES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T, H, DV]; grid (ROW_TILES * splits, KV heads, items).

    DECODE: items [N] are sequences of one new token; else items [N, 2] are (sequence, first of
    TILE_TOKENS new tokens).
    TWO_LOOPS: keys that all rows see are taken without masks; not with WINDOW or SPLIT.
    SPLIT: a program takes its share of the keys, if there is one for it, and leaves a part:
    part_acc float32 [N, H, splits, DV], part_stats float32 [N, H, splits, 2] of peak and total.
    A sequence that one program has to itself has no parts.
    """
    pdl_wait(PDL)
    pdl_launch_dependents(PDL)
    item = tl.program_id(2)
    kv_head = tl.program_id(1)
    tile = tl.program_id(0) % ROW_TILES
    if DECODE:
        sequence = tl.load(items + item)
        tile_token = 0
    else:
        sequence = tl.load(items + 2 * item)
        tile_token = tl.load(items + 2 * item + 1)
    row0 = tl.load(query_start + sequence)
    new_tokens = tl.load(query_start + sequence + 1) - row0
    start = tl.load(seq_lens + sequence) - new_tokens
    first_row = tile_token * G + tile * BM
    end_row = tl.minimum(new_tokens, tile_token + TILE_TOKENS) * G
    if first_row >= end_row:
        return
    row = first_row + tl.arange(0, BM)
    valid = row < end_row
    token = row // G
    head = kv_head * G + row % G
    position = start + token

    # Keys that some row of this program sees.
    first_position = start + first_row // G
    begin = 0
    if WINDOW:
        begin = tl.maximum(0, first_position - window + 1)
    end = start + (tl.minimum(end_row, first_row + BM) - 1) // G + 1
    split = 0
    if SPLIT:
        split = tl.program_id(0) // ROW_TILES
        splits = tl.num_programs(0) // ROW_TILES
        share, shares = _share_out(end - begin, splits, short_splits, LONG, MIN_SHARE, BN)
        if split >= shares:
            return
        begin += split * share
        end = tl.minimum(end, begin + share)

    peak = tl.full([BM], NOTHING, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DVP], tl.float32)
    if SINKS:
        sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2_E
        peak = tl.where(split == 0, sink, peak)
        total = tl.where(split == 0, 1.0, total)

    q_row = q + (row0 + token).to(tl.int64) * q_token_stride + head * q_head_stride
    q1 = _rows(q_row, valid, D, D1, True)
    q2 = q1
    if D2 > 0:
        q2 = _rows(q_row + D1, valid, D - D1, D2, True)
    table = blocks + tl.load(block_start + sequence)
    k_cache += kv_head * k_head_stride
    v_cache += kv_head * v_head_stride
    if TWO_LOOPS:
        seen_by_all = begin + (first_position + 1 - begin) // BN * BN
        acc, total, peak = _walk(
            acc, total, peak, q1, q2, position, begin, seen_by_all, table, k_cache, v_cache,
            scale, window, k_block_stride, k_token_stride, v_block_stride, v_token_stride,
            D1, D2, D, DV, DVP, KEYS_ARE_VALUES, WINDOW, False, BLOCK_SIZE, BN,
        )  # fmt: skip
        begin = seen_by_all
    acc, total, peak = _walk(
        acc, total, peak, q1, q2, position, begin, end, table, k_cache, v_cache,
        scale, window, k_block_stride, k_token_stride, v_block_stride, v_token_stride,
        D1, D2, D, DV, DVP, KEYS_ARE_VALUES, WINDOW, True, BLOCK_SIZE, BN,
    )  # fmt: skip

    column = tl.arange(0, DVP)
    inside = valid[:, None] & (column < DV)[None, :]
    if SPLIT:
        part = (item.to(tl.int64) * heads + head) * splits + split
        shared = shares > 1
        tl.store(part_stats + 2 * part, peak, mask=valid & shared)
        tl.store(part_stats + 2 * part + 1, total, mask=valid & shared)
        place = part_acc + part[:, None] * DV + column[None, :]
        tl.store(place, acc, mask=inside & shared)
        inside = inside & (shares == 1)
    # Padding sees nothing: zero by zero would not be zero.
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    place = out + ((row0 + token).to(tl.int64) * heads + head)[:, None] * DV + column[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits", "short_splits"])
def reduce_kernel(
    part_acc, part_stats, query_start, seq_lens, items, out, window, heads, splits, short_splits,
    DV: tl.constexpr, DVP: tl.constexpr, WINDOW: tl.constexpr, LONG: tl.constexpr,
    MIN_SHARE: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T, H, DV] of the parts that decode sequences were cut into; grid (H, items).

    Nothing is done for a sequence that wasn't cut.
    """
    pdl_wait(PDL)
    pdl_launch_dependents(PDL)
    head = tl.program_id(0)
    item = tl.program_id(1)
    sequence = tl.load(items + item)
    keys = tl.load(seq_lens + sequence)
    if WINDOW:
        keys = tl.minimum(keys, window)
    _, shares = _share_out(keys, splits, short_splits, LONG, MIN_SHARE, BN)
    if shares == 1:
        return
    row = tl.load(query_start + sequence).to(tl.int64)
    column = tl.arange(0, DVP)
    first_part = (item.to(tl.int64) * heads + head) * splits
    peak = NOTHING
    total = 0.0
    acc = tl.zeros([DVP], tl.float32)
    for first in range(0, shares, REDUCED_AT_ONCE):
        split = first + tl.arange(0, REDUCED_AT_ONCE)
        stats = part_stats + 2 * (first_part + split)
        peaks = tl.load(stats, mask=split < shares, other=NOTHING)
        totals = tl.load(stats + 1, mask=split < shares, other=0.0)
        place = part_acc + (first_part + split)[:, None] * DV + column[None, :]
        inside = (totals > 0.0)[:, None] & (column < DV)[None, :]
        parts = tl.load(place, mask=inside, other=0.0)
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        weight = tl.exp2(peaks - new_peak)
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weight * totals, 0)
        acc = acc * shrink + tl.sum(parts * weight[:, None], 0)
        peak = new_peak
    acc = acc / tl.where(total > 0.0, total, 1.0)
    place = out + (row * heads + head) * DV + column
    tl.store(place, acc.to(out.dtype.element_ty), mask=column < DV)


@triton.jit
def write_kernel(
    k, v, k_cache, v_cache, write_slots,
    k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    k_cache_block_stride, k_cache_token_stride, k_cache_head_stride,
    v_cache_block_stride, v_cache_token_stride, v_cache_head_stride,
    KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WRITE_V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """New keys and values to their slots; grid (T, parts of BLOCK columns)."""
    pdl_wait(PDL)
    pdl_launch_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(write_slots + token)
    if slot < 0:
        return
    block = (slot // BLOCK_SIZE).to(tl.int64)
    offset = slot % BLOCK_SIZE
    source = k + token * k_token_stride + column // D * k_head_stride + column % D
    target = k_cache + block * k_cache_block_stride + offset * k_cache_token_stride
    target += column // D * k_cache_head_stride + column % D
    inside = column < KV_HEADS * D
    tl.store(target, tl.load(source, mask=inside), mask=inside)
    if WRITE_V:
        source = v + token * v_token_stride + column // DV * v_head_stride + column % DV
        target = v_cache + block * v_cache_block_stride + offset * v_cache_token_stride
        target += column // DV * v_cache_head_stride + column % DV
        inside = column < KV_HEADS * DV
        tl.store(target, tl.load(source, mask=inside), mask=inside)
