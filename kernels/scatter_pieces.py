"""Adapters as they are stored become what the pool holds: pieces cast, padded and put in place."""

from __future__ import annotations

import numpy as np
import torch

from .backends import gpu
from .checks import FLOAT_TYPES, check, check_contiguous
from .host import on_host

PIECE_FIELDS = 5
_FLOAT16_MAX = torch.finfo(torch.float16).max


def scatter_pieces_(
    pool: torch.Tensor, staged: torch.Tensor, pieces: torch.Tensor, flat: bool = False
) -> None:
    """Writes rows of `staged` to `pool`, with columns of zeros behind them.

    Args:
        pool: [elements], written in place. Of float16, it takes larger values as its largest: an
            infinite factor would reach other adapters' rows in a product that they share.
        staged: [elements], of any float type.
        pieces: int64 [P, 5], of each: its first element in `staged`, its first in `pool`, how many
            elements of `pool` it fills, its columns in `staged` and in `pool`. A piece fills whole
            rows; one of no columns is zeros. Pieces don't overlap in `pool`.
        flat: every piece has as many columns here as there or none at all, and its first elements
            and its size are multiples of 8: a GPU then copies 16 bytes at a time.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or layout.
    """
    check("pool", pool, shape=(None,), dtype=FLOAT_TYPES)
    check("staged", staged, shape=(None,), dtype=FLOAT_TYPES, device=pool.device)
    check("pieces", pieces, shape=(None, PIECE_FIELDS), dtype=torch.int64, device=pool.device)
    for name, tensor in (("pool", pool), ("staged", staged), ("pieces", pieces)):
        check_contiguous(name, tensor)
    if pool.device.type != "cpu":
        gpu().scatter_pieces_(pool, staged, pieces, flat)
        return
    target, source = _bits(pool), _bits(cast(staged, pool.dtype))
    for first, place, size, columns, stored in on_host(pieces).tolist():
        if columns == stored:
            target[place : place + size] = source[first : first + size]
            continue
        rows = size // stored
        block = target[place : place + size].reshape(rows, stored)
        block[:, :columns] = source[first : first + rows * columns].reshape(rows, columns)
        block[:, columns:] = 0


def cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As the pool holds them."""
    if dtype == torch.float16 and values.dtype != dtype:
        values = values.float().clamp(-_FLOAT16_MAX, _FLOAT16_MAX)
    return values.to(dtype)


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The same memory in a type that numpy has."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16).numpy()
