"""FP8 weights inside the grouped GEMMs: weight-only, so their products are those of the weights'
values in the dtype of the activations, which holds e4m3 exactly. A block's scale is applied to its
part of the product in float32: nothing else is rounded."""

from __future__ import annotations

import triton
import triton.knobs
import triton.language as tl

from ..block_fp8 import FP8_BLOCK

BLOCK = tl.constexpr(FP8_BLOCK)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def decode(codes, DTYPE: tl.constexpr):
    """e4m3 codes as the floats that they are, exactly."""
    values = codes.to(DTYPE)
    if _INTERPRETED:  # which takes the two codes of NaN for 480
        values = tl.where(tl.abs(values) == 480.0, float("nan"), values)
    return values


@triton.jit
def block_scale(scale, n, n0, k0, columns, inner, BN: tl.constexpr):
    """Of the columns n (from n0, BN of them) of a product's step from k0: a number, or [1, BN].

    scale: of one matrix [columns, inner]. A step lies within one block.
    """
    steps = tl.cdiv(inner, BLOCK)
    if BN <= BLOCK:
        found = tl.load(scale + n0 // BLOCK * steps + k0 // BLOCK)
    else:
        each = tl.load(scale + n // BLOCK * steps + k0 // BLOCK, mask=n < columns, other=0.0)
        found = each[None, :]
    return found
