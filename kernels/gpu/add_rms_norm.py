"""A residual stream's addition and the norm behind it, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import USE_PDL, next_power_of_2, pdl_launch_dependents, pdl_wait


@triton.jit
def add_rms_norm_kernel(
    x, y, weight, out, eps,
    N: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [T, N] += y; out [T, N] = x / rms(x) * weight. A program has one row."""
    pdl_wait(PDL)
    pdl_launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64) * N
    column = tl.arange(0, BLOCK)
    inside = column < N
    value = tl.load(x + row + column, mask=inside, other=0.0)
    if ADD:
        added = tl.load(y + row + column, mask=inside, other=0.0)
        # Rounded before the norm, which is thus the norm of what x holds from now on.
        value = (value.to(tl.float32) + added.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + row + column, value, mask=inside)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / N + eps)
    result = value * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + column, result.to(out.dtype.element_ty), mask=inside)


def add_rms_norm_(
    x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """`kernels.add_rms_norm_` of contiguous tensors."""
    out = torch.empty_like(x)
    rows, n = x.shape
    if rows:
        block = next_power_of_2(n)
        add_rms_norm_kernel[(rows,)](
            x, x if y is None else y, weight, out, eps,
            N=n, BLOCK=block, ADD=y is not None, PDL=USE_PDL,
            num_warps=min(16, max(1, block // 512)), launch_pdl=USE_PDL,
        )  # fmt: skip
    return out
