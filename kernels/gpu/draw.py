"""Drawing a token in one launch: a program a row, which reads it twice and one block a third time.

In torch's operations the shares of 64 rows of 152,000 logits are written and read a dozen times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, next_power_of_2

_SHARE = tl.constexpr(float(1 << 40))  # `ONE` of ..least_kept
_BLOCK = 4096


@triton.jit
def _shares(row, start, vocab, best, temperature, BLOCK: tl.constexpr):
    """int64 [BLOCK] of the row's logits from `start` on; 0 beyond them."""
    n = start + tl.arange(0, BLOCK)
    x = tl.load(row + n, mask=n < vocab, other=float("-inf")) / temperature
    return (tl.exp(x - best) * _SHARE).to(tl.int64)


@triton.jit
def draw_kernel(
    logits, uniform, rows, temperatures, out, vocab, stride,
    SELECTED: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """out int64 [R], a program an entry; BLOCKS: at least as many as a row has."""
    nth = tl.program_id(0)
    row = nth.to(tl.int64)
    if SELECTED:
        row = tl.load(rows + nth)
    row = logits + row * stride
    temperature = 1.0
    if SCALED:
        temperature = tl.load(temperatures + nth)
    u = tl.load(uniform + nth)
    offsets = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        here = start + offsets < vocab
        x = tl.load(row + start + offsets, mask=here, other=float("-inf"))
        largest = tl.maximum(largest, x)
    best = tl.max(largest, 0) / temperature  # rounding keeps the order: the largest of x / t

    of_block = tl.arange(0, BLOCKS)
    sums = tl.zeros([BLOCKS], tl.int64)
    for block in range(0, tl.cdiv(vocab, BLOCK)):
        shares = _shares(row, block * BLOCK, vocab, best, temperature, BLOCK)
        sums = tl.where(of_block == block, tl.sum(shares, 0), sums)
    total = tl.sum(sums, 0)
    # A number just below 1 may round up to the total, beyond every token.
    target = tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)
    block = tl.sum((tl.cumsum(sums, 0) <= target).to(tl.int32), 0)
    target -= tl.sum(tl.where(of_block < block, sums, 0), 0)
    shares = _shares(row, block * BLOCK, vocab, best, temperature, BLOCK)
    place = tl.sum((tl.cumsum(shares, 0) <= target).to(tl.int32), 0)
    # Rows that aren't finite hold anything; their token must still be one.
    token = tl.minimum(block * BLOCK + place, vocab - 1)
    tl.store(out + nth, token.to(tl.int64))


def draw(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    rows: torch.Tensor | None,
    temperature: torch.Tensor | None,
) -> torch.Tensor:
    """`kernels.draw` on a GPU."""
    out = torch.empty(uniform.shape[0], dtype=torch.int64, device=logits.device)
    vocab = logits.shape[1]
    block = min(_BLOCK, next_power_of_2(vocab))
    if out.shape[0]:
        draw_kernel[(out.shape[0],)](
            logits, uniform, out if rows is None else rows,
            uniform if temperature is None else temperature, out, vocab, logits.stride(0),
            SELECTED=rows is not None, SCALED=temperature is not None, BLOCK=block,
            BLOCKS=next_power_of_2(cdiv(vocab, block)), num_warps=16,
        )  # fmt: skip
    return out
