"""The one LoRA primitive under all others: out[rows] += scale * (x[rows] A^T) B^T, for many
(rows, A, B) at once, with A and B anywhere in a flat pool and of any rank."""

from __future__ import annotations

import numpy as np
import torch

from . import mkl_gemm
from .low_rank_gathered import expand_gathered_, shrink_gathered_
from .low_rank_products import Expands, Shrinks

FLOAT32_BYTES = 4


def add_low_rank_(
    out: torch.Tensor,
    x: torch.Tensor,
    pool: torch.Tensor,
    shrinks: Shrinks,
    expands: Expands,
    a_transposed: bool,
) -> None:
    """Add every expand to out [rows, columns], in place; x [rows, in].

    A is [rank, in] or, `a_transposed`, [in, rank]; B is [out_size, rank].

    Raises:
        ValueError: an offset names elements beyond the pool.
    """
    if not shrinks.offset.size or not expands.offset.size:
        return
    end_a = int((shrinks.offset + shrinks.rank * x.shape[1]).max())
    end_b = int((expands.offset + expands.rank * expands.out_size).max())
    if max(end_a, end_b) > pool.numel():
        raise ValueError(
            f"tables name elements up to {max(end_a, end_b)} of a pool that has {pool.numel()}"
        )
    # Read only where a shrink has written.
    s = x.new_empty(x.shape[0], int((shrinks.column + shrinks.rank).max()))
    if mkl_gemm.usable(out, x, pool):
        _shrink_mkl_(s, x, pool, shrinks, a_transposed)
        _expand_mkl_(out, s, pool, expands)
    else:
        shrink_gathered_(s, x, pool, shrinks, a_transposed)
        expand_gathered_(out, s, pool, expands)


def _shrink_mkl_(s, x, pool, shrinks: Shrinks, a_transposed: bool) -> None:
    first = shrinks.first_row
    mkl_gemm.sgemm_batch(
        count=first.size,
        m=shrinks.end_row - first,
        n=shrinks.rank,
        k=x.shape[1],
        a=_row_address(x, first),
        lda=mkl_gemm.row_length(x),
        b=pool.data_ptr() + shrinks.offset * FLOAT32_BYTES,
        ldb=shrinks.rank if a_transposed else x.shape[1],
        transpose_b=not a_transposed,
        c=_row_address(s, first) + shrinks.column * FLOAT32_BYTES,
        ldc=mkl_gemm.row_length(s),
    )


def _expand_mkl_(out, s, pool, expands: Expands) -> None:
    first = expands.first_row
    mkl_gemm.sgemm_batch(
        count=first.size,
        m=expands.end_row - first,
        n=expands.out_size,
        k=expands.rank,
        alpha=expands.scale,
        a=_row_address(s, first) + expands.column * FLOAT32_BYTES,
        lda=mkl_gemm.row_length(s),
        b=pool.data_ptr() + expands.offset * FLOAT32_BYTES,
        ldb=expands.rank,
        transpose_b=True,
        beta=1.0,
        c=_row_address(out, first) + expands.out_column * FLOAT32_BYTES,
        ldc=mkl_gemm.row_length(out),
    )


def _row_address(matrix: torch.Tensor, row: np.ndarray) -> np.ndarray:
    return matrix.data_ptr() + row.astype(np.int64) * (mkl_gemm.row_length(matrix) * FLOAT32_BYTES)
