"""Pieces of a staged layer to their places in the pool: a program a piece."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 2048


@triton.jit
def scatter_pieces_kernel(
    pool, staged, pieces, limit,
    CLAMP: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See `kernels.scatter_pieces_`. CLAMP: to `limit`, the largest that the pool's type has."""
    piece = pieces + tl.program_id(0).to(tl.int64) * 5
    first, place, size = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2)
    columns, stored = tl.load(piece + 3), tl.load(piece + 4)
    if FLAT:
        first, place = tl.multiple_of(first, 8), tl.multiple_of(place, 8)
        size = tl.multiple_of(size, 8)
    for start in tl.range(0, size, BLOCK):
        n = start + tl.arange(0, BLOCK)
        inside = n < size
        if FLAT:
            value = tl.load(staged + first + n, mask=inside & (columns > 0), other=0.0)
        else:
            column = n % stored
            at = first + n // stored * columns + column
            value = tl.load(staged + at, mask=inside & (column < columns), other=0.0)
        value = value.to(tl.float32)
        if CLAMP:
            value = tl.minimum(tl.maximum(value, -limit), limit)
        tl.store(pool + place + n, value.to(pool.dtype.element_ty), mask=inside)


def scatter_pieces_(
    pool: torch.Tensor, staged: torch.Tensor, pieces: torch.Tensor, flat: bool
) -> None:
    """`kernels.scatter_pieces_` on a GPU. Arguments are taken as checked."""
    if pieces.shape[0]:
        half = pool.dtype == torch.float16
        scatter_pieces_kernel[(pieces.shape[0],)](
            pool, staged, pieces, torch.finfo(pool.dtype).max if half else 0.0,
            CLAMP=half and staged.dtype != pool.dtype, FLAT=flat, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
