"""Top-k and top-p without a sort: a program bisects the order of float32 numbers for its row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import next_power_of_2

# Three pivots a pass leave at most a quarter of 2^32 numbers: after so many passes one is left.
_PASSES = tl.constexpr(17)
_SHARE = tl.constexpr(float(1 << 40))  # `ONE` of ..least_kept
_LOWEST = tl.constexpr(-2139095041)  # the place of -inf
_BLOCK = 4096  # 152,000 logits are read from L2 in 38 steps of a pass; 8 numbers a thread


@triton.jit
def _place(x):
    """float32 -> int32 in the same order. Its own inverse on bits."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _pivots(low, high):
    width = high - low
    return low + (width + 3) // 4, low + (width + 1) // 2, low + (3 * width + 3) // 4


@triton.jit
def _narrow(low, high, a, b, c, enough_a, enough_b, enough_c):
    """The part of [low, high] that holds the largest place which is still enough; low is."""
    new_low = tl.where(enough_c, c, tl.where(enough_b, b, tl.where(enough_a, a, low)))
    new_high = tl.where(enough_c, high, tl.where(enough_b, c - 1, tl.where(enough_a, b - 1, a - 1)))
    return new_low, new_high


@triton.jit
def least_kept_kernel(logits, top_k, top_p, out, vocab, BLOCK: tl.constexpr):
    """out [N] float32: the smallest logit that top-k and top-p keep; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    offsets = tl.arange(0, BLOCK)
    never = float("-inf")

    largest = tl.full([BLOCK], never, tl.float32)
    for start in range(0, vocab, BLOCK):
        here = start + offsets < vocab
        largest = tl.maximum(largest, tl.load(logits + start + offsets, mask=here, other=never))
    best = tl.max(largest, 0)
    highest = _place(best).to(tl.int64)

    # The largest place at or above which k logits stand; the lowest has them all.
    low = tl.full([], _LOWEST, tl.int64)
    high = tl.where(k < vocab, highest, low)
    if k < vocab:
        for _ in range(_PASSES):
            a, b, c = _pivots(low, high)
            na = tl.zeros([BLOCK], tl.int32)
            nb = tl.zeros([BLOCK], tl.int32)
            nc = tl.zeros([BLOCK], tl.int32)
            for start in range(0, vocab, BLOCK):
                here = start + offsets < vocab
                x = tl.load(logits + start + offsets, mask=here, other=never)
                place = _place(x).to(tl.int64)
                na += (here & (place >= a)).to(tl.int32)
                nb += (here & (place >= b)).to(tl.int32)
                nc += (here & (place >= c)).to(tl.int32)
            low, high = _narrow(
                low, high, a, b, c, tl.sum(na, 0) >= k, tl.sum(nb, 0) >= k, tl.sum(nc, 0) >= k
            )

    # The largest place at or above which shares sum to p of what is above the first one.
    if p < 1:
        shares = tl.zeros([BLOCK], tl.int64)
        for start in range(0, vocab, BLOCK):
            here = start + offsets < vocab
            x = tl.load(logits + start + offsets, mask=here, other=never)
            share = (tl.exp(x - best) * _SHARE).to(tl.int64)
            shares += tl.where(here & (_place(x).to(tl.int64) >= low), share, 0)
        wanted = p * tl.sum(shares, 0).to(tl.float64)
        high = highest
        for _ in range(_PASSES):
            a, b, c = _pivots(low, high)
            sa = tl.zeros([BLOCK], tl.int64)
            sb = tl.zeros([BLOCK], tl.int64)
            sc = tl.zeros([BLOCK], tl.int64)
            for start in range(0, vocab, BLOCK):
                here = start + offsets < vocab
                x = tl.load(logits + start + offsets, mask=here, other=never)
                place = _place(x).to(tl.int64)
                share = (tl.exp(x - best) * _SHARE).to(tl.int64)
                sa += tl.where(here & (place >= a), share, 0)
                sb += tl.where(here & (place >= b), share, 0)
                sc += tl.where(here & (place >= c), share, 0)
            low, high = _narrow(
                low, high, a, b, c,
                tl.sum(sa, 0).to(tl.float64) >= wanted,
                tl.sum(sb, 0).to(tl.float64) >= wanted,
                tl.sum(sc, 0).to(tl.float64) >= wanted,
            )  # fmt: skip

    bits = low.to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    tl.store(out + row, bits.to(tl.float32, bitcast=True))


def least_kept(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """See `kernels.least_kept`."""
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(_BLOCK, next_power_of_2(vocab))
    least_kept_kernel[(rows,)](logits, top_k, top_p, out, vocab, BLOCK=block, num_warps=16)
    return out
