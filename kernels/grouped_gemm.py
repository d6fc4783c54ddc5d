"""The experts' base GEMMs over rows that are ordered by expert."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from . import mkl_gemm
from .block_fp8 import dequantise_fp8
from .host import on_host

FLOAT32_BYTES = 4
# With up to so many rows per expert, MKL is up to twice as fast when it writes the product
# transposed; with more in one product it falls behind, so longer runs of rows are cut, and from a
# larger mean on the plain form wins. (Measured on AMD EPYC, weights of 256 x 256 and 256 x 128.)
FEW_ROWS = 8


def grouped_mm(
    rows: torch.Tensor,
    weights: torch.Tensor,
    expert_first_row: torch.Tensor,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """rows [n, in], weights [E, out, in], expert_first_row int32 [E + 1] -> [n, out].

    FP8 weights, whose `scale` is given, are dequantised to float32, an expert at a time.
    """
    if mkl_gemm.usable(rows, weights):
        return _grouped_mm_mkl(rows, weights, on_host(expert_first_row))
    out = rows.new_empty(rows.shape[0], weights.shape[1])
    bounds = expert_first_row.tolist()
    for expert, (first, end) in enumerate(pairwise(bounds)):
        if first == end:
            continue
        if scale is None:
            torch.mm(rows[first:end], weights[expert].t(), out=out[first:end])
        else:
            weight = dequantise_fp8(weights[expert], scale[expert])
            out[first:end] = rows[first:end].float() @ weight.t()
    return out


def _grouped_mm_mkl(rows: torch.Tensor, weights: torch.Tensor, bounds: np.ndarray) -> torch.Tensor:
    expert = (bounds[1:] > bounds[:-1]).nonzero()[0]
    first = bounds[expert].astype(np.int64)
    length = bounds[expert + 1] - first
    num_rows, out_size = rows.shape[0], weights.shape[1]
    few = num_rows <= FEW_ROWS * expert.size
    if few and length.size and length.max() > FEW_ROWS:
        expert, first, length = _cut(expert, first, length)
    row_length = mkl_gemm.row_length(rows)
    rows_at = rows.data_ptr() + first * (row_length * FLOAT32_BYTES)
    weights_at = weights.data_ptr() + expert * (weights.stride(0) * FLOAT32_BYTES)
    if few:
        turned = rows.new_empty(out_size, num_rows)
        mkl_gemm.sgemm_batch(
            count=expert.size, transpose_b=True,
            m=out_size, n=length, k=rows.shape[1],
            a=weights_at, lda=mkl_gemm.row_length(weights),
            b=rows_at, ldb=row_length,
            c=turned.data_ptr() + first * FLOAT32_BYTES, ldc=num_rows,
        )  # fmt: skip
        return turned.t().contiguous()
    out = rows.new_empty(num_rows, out_size)
    mkl_gemm.sgemm_batch(
        count=expert.size, transpose_b=True,
        m=length, n=out_size, k=rows.shape[1],
        a=rows_at, lda=row_length,
        b=weights_at, ldb=mkl_gemm.row_length(weights),
        c=out.data_ptr() + first * (out_size * FLOAT32_BYTES), ldc=out_size,
    )  # fmt: skip
    return out


def _cut(expert: np.ndarray, first: np.ndarray, length: np.ndarray):
    """The same products in pieces of at most FEW_ROWS rows."""
    pieces = -(-length // FEW_ROWS)
    whole = np.repeat(np.arange(expert.size), pieces)
    start = (np.arange(whole.size) - (pieces.cumsum() - pieces)[whole]) * FEW_ROWS
    length = np.minimum(length[whole] - start, FEW_ROWS)
    return expert[whole], first[whole] + start, length
