"""Lists of low-rank products, as the host plans them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shrinks:
    """n products s[first_row:end_row, column:column + rank] = x[first_row:end_row] A^T.

    Columns of equal length, on the host. Only what is adapted is listed: offsets are valid, ranks
    positive.
    """

    first_row: np.ndarray  # int [n]
    end_row: np.ndarray  # int [n]
    offset: np.ndarray  # int64 [n], A's first element in the pool
    rank: np.ndarray  # int [n]
    column: np.ndarray  # int [n]


@dataclass(frozen=True)
class Expands:
    """n products out[first_row:end_row, out_column:out_column + out_size] += scale * s[same] B^T.

    `column` and `rank` say which columns of s.
    """

    first_row: np.ndarray  # int [n]
    end_row: np.ndarray  # int [n]
    offset: np.ndarray  # int64 [n], B's first element in the pool
    rank: np.ndarray  # int [n]
    column: np.ndarray  # int [n]
    scale: np.ndarray  # float32 [n]
    out_column: np.ndarray  # int [n]
    out_size: np.ndarray  # int [n]
