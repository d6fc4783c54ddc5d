"""Shrink and expand by torch operations alone: any device, any float type.

Products of one size form a class; a class is cut into tiles of few rows, the tiles' factors are
gathered from the pool, and one batched product does them all. Ranks are never padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from .low_rank_products import Expands, Shrinks

# Largest number of elements gathered at a time (64 MiB in float32): bounds the memory of long
# prefills over many adapters.
GATHER_ELEMENTS = 1 << 24
MAX_TILE_ROWS = 64


def shrink_gathered_(
    s: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, shrinks: Shrinks, a_transposed: bool
) -> None:
    """Fill the columns of s that `shrinks` names."""
    in_size = x.shape[1]
    for mine, (rank, column) in _classes(shrinks.rank, shrinks.column):
        for tiles in _tiles(shrinks.first_row[mine], shrinks.end_row[mine], rank * in_size):
            offset = shrinks.offset[mine][tiles.product]
            a = _gather_blocks(pool, offset, rank * in_size).to(x.dtype)
            if a_transposed:
                a = a.view(-1, in_size, rank)
            else:
                a = a.view(-1, rank, in_size).transpose(1, 2)
            rows = _to(tiles.rows, x).view(-1)
            tile = x.index_select(0, rows).view(*tiles.rows.shape, in_size)
            product = torch.bmm(tile, a).view(-1, rank)
            used = _to(tiles.used, x)
            s[:, column : column + rank].index_copy_(0, rows[used], product[used])


def expand_gathered_(
    out: torch.Tensor, s: torch.Tensor, pool: torch.Tensor, expands: Expands
) -> None:
    """Add each product to the columns of out that `expands` names."""
    sizes = (expands.rank, expands.column, expands.out_column, expands.out_size)
    for mine, (rank, column, out_column, out_size) in _classes(*sizes):
        source = s[:, column : column + rank]
        target = out[:, out_column : out_column + out_size]
        for tiles in _tiles(expands.first_row[mine], expands.end_row[mine], rank * out_size):
            offset = expands.offset[mine][tiles.product]
            b = _gather_blocks(pool, offset, rank * out_size).to(s.dtype)
            rows = _to(tiles.rows, s).view(-1)
            tile = source.index_select(0, rows).view(*tiles.rows.shape, rank)
            tile = tile * _to(expands.scale[mine][tiles.product], s).view(-1, 1, 1)
            product = torch.bmm(tile.to(s.dtype), b.view(-1, out_size, rank).transpose(1, 2))
            used = _to(tiles.used, s)
            target.index_add_(0, rows[used], product.view(-1, out_size)[used].to(out.dtype))


@dataclass(frozen=True)
class _Tiles:
    product: np.ndarray  # int [n], which product each tile is part of
    rows: np.ndarray  # int64 [n, height]; places that aren't used repeat the tile's first row
    used: np.ndarray  # int64, flat places of `rows` that are used


def _tiles(first_row: np.ndarray, end_row: np.ndarray, block_size: int) -> Iterator[_Tiles]:
    """Cut products into tiles of about their mean number of rows, so many at a time that their
    blocks of `block_size` elements stay under GATHER_ELEMENTS."""
    length = end_row - first_row
    height = min(MAX_TILE_ROWS, 1 << (int(length.sum() - 1) // length.size).bit_length())
    count = -(-length // height)
    product = np.repeat(np.arange(length.size), count)
    nth = np.arange(product.size) - np.repeat(np.cumsum(count) - count, count)
    first = first_row[product] + nth * height
    rows = first[:, None] + np.arange(height)
    used = rows < end_row[product][:, None]
    rows = np.where(used, rows, first[:, None])
    at_once = max(1, GATHER_ELEMENTS // block_size)
    for start in range(0, product.size, at_once):
        part = slice(start, start + at_once)
        yield _Tiles(product[part], rows[part].astype(np.int64), np.flatnonzero(used[part]))


def _classes(*sizes: np.ndarray) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Indices of the products that agree in all `sizes`, and these sizes."""
    distinct, which = np.unique(np.stack(sizes, 1), axis=0, return_inverse=True)
    for i, values in enumerate(distinct.tolist()):
        yield np.flatnonzero(which.reshape(-1) == i), values


def _gather_blocks(pool: torch.Tensor, offset: np.ndarray, size: int) -> torch.Tensor:
    """[n, size] copies of the elements at each offset, in the largest pieces that all of them and
    the pool divide into: a gather of long pieces is several times faster than of elements."""
    piece = int(np.gcd.reduce(offset, initial=size))
    whole = pool[: pool.numel() // piece * piece].view(-1, piece)
    index = (offset // piece)[:, None] + np.arange(size // piece)
    return whole.index_select(0, _to(index.reshape(-1), pool)).view(-1, size)


def _to(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(array).to(like.device)
