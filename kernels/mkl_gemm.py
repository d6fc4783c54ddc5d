"""Many small float32 matrix products of any sizes in one call: MKL's `cblas_sgemm_batch`.

torch's CPU builds for x86 link MKL and export this function, but no torch operation offers it.
It reads every operand where it lies, so that factors scattered over a pool are neither copied nor
padded to a common rank. Where it is missing (other CPUs, other BLAS), callers use torch alone.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch

Column = Any  # an array [n], or one number for all products

_ROW_MAJOR = 101
_NO_TRANS, _TRANS = 111, 112


@functools.cache
def _sgemm_batch() -> Any | None:
    """The C function, or None if this torch hasn't got it."""
    if not torch.backends.mkl.is_available():
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        function = library.cblas_sgemm_batch
    except (OSError, AttributeError):
        return None
    pointer = ctypes.c_void_p
    function.argtypes = [ctypes.c_int, *[pointer] * 13, ctypes.c_int, pointer]
    function.restype = None
    return function


def usable(*tensors: torch.Tensor) -> bool:
    """Whether `sgemm_batch` can work on these: float32 on CPU, row-major, rows not overlapping."""
    if _sgemm_batch() is None:
        return False
    for t in tensors:
        if t.dtype != torch.float32 or t.device.type != "cpu" or t.stride(-1) != 1:
            return False
        if t.dim() > 1 and t.shape[-2] > 1 and t.stride(-2) < t.shape[-1]:
            return False
    return True


def row_length(matrix: torch.Tensor) -> int:
    """Elements from one row to the next. torch may give the only row of a matrix any stride, but
    MKL refuses one below the number of columns."""
    return max(matrix.stride(-2), matrix.shape[-1], 1)


def sgemm_batch(
    *,
    m: Column,
    n: Column,
    k: Column,
    a: Column,
    lda: Column,
    b: Column,
    ldb: Column,
    c: Column,
    ldc: Column,
    count: int,
    alpha: Column = 1.0,
    beta: float = 0.0,
    transpose_b: bool,
) -> None:
    """c = alpha * a @ op(b) + beta * c for `count` products of row-major matrices.

    a [m, k], c [m, n], b [k, n] or, transposed, [n, k], each given as an address with a row length
    (lda, ldb, ldc) in elements. Nothing is checked: the caller owns the addresses.
    """
    function = _sgemm_batch()
    if function is None:
        raise RuntimeError("this torch build has no cblas_sgemm_batch; ask usable() first")
    if count == 0:
        return
    ints = np.empty((9, count), dtype=np.int32)
    addresses = np.empty((3, count), dtype=np.int64)
    factors = np.empty((2, count), dtype=np.float32)
    ints[0] = _NO_TRANS
    ints[1] = _TRANS if transpose_b else _NO_TRANS
    ints[2], ints[3], ints[4] = m, n, k
    ints[5], ints[6], ints[7] = lda, ldb, ldc
    ints[8] = 1  # each product is a group of its own
    addresses[0], addresses[1], addresses[2] = a, b, c
    factors[0], factors[1] = alpha, beta
    i, p, f = ints.ctypes.data, addresses.ctypes.data, factors.ctypes.data
    step, wide = 4 * count, 8 * count
    function(
        _ROW_MAJOR,
        i, i + step, i + 2 * step, i + 3 * step, i + 4 * step,
        f, p, i + 5 * step, p + wide, i + 6 * step,
        f + step, p + 2 * wide, i + 7 * step,
        count, i + 8 * step,
    )  # fmt: skip
