"""The one LoRA primitive under all others: out[rows, columns] += scale * (x[rows] A^T) B^T, for many
(rows, A, B) at once, with A and B anywhere in a flat pool and of any rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Largest number of elements that one batched product may gather from the pool at a time (64 MiB
# in float32): bounds the memory of long prefills over many adapters.
GATHER_ELEMENTS = 1 << 24
MAX_TILE_ROWS = 64


@dataclass(frozen=True)
class LowRankTerms:
    """n terms, as columns of equal length on one device; each is one adapted projection of a segment.

    Only terms that have factors are listed: every offset is valid and every rank positive.
    """

    first_row: torch.Tensor  # int64 [n], rows of x and out
    end_row: torch.Tensor  # int64 [n]
    offset_a: torch.Tensor  # int64 [n], elements into the pool
    offset_b: torch.Tensor  # int64 [n]
    rank: torch.Tensor  # int64 [n]
    scale: torch.Tensor  # float32 [n]
    out_first: torch.Tensor  # int64 [n], first column of out
    out_size: torch.Tensor  # int64 [n], columns of out


def add_low_rank_(
    out: torch.Tensor,
    x: torch.Tensor,
    pool: torch.Tensor,
    terms: LowRankTerms,
    a_transposed: bool,
) -> None:
    """Add every term to `out` [rows, columns] in place. A is [rank, in], or [in, rank] transposed."""
    kind = torch.stack((terms.rank, terms.out_size), 1)
    kinds, kind_of_term = torch.unique(kind, dim=0, return_inverse=True)
    for i, (rank, out_size) in enumerate(kinds.tolist()):
        mine = (kind_of_term == i).nonzero().squeeze(1)
        _add_one_kind_(out, x, pool, terms, mine, rank, out_size, a_transposed)


def _add_one_kind_(out, x, pool, terms, mine, rank, out_size, a_transposed):
    """The terms `mine` that share rank and output size, as batched products over row tiles."""
    first, end = terms.first_row[mine], terms.end_row[mine]
    rows = end - first
    mean_rows = max(1, int(rows.sum()) // mine.numel())
    tile_rows = min(MAX_TILE_ROWS, 1 << (mean_rows - 1).bit_length())
    tiles = (rows + tile_rows - 1) // tile_rows
    term_of_tile = torch.repeat_interleave(torch.arange(mine.numel(), device=x.device), tiles)
    nth = torch.arange(term_of_tile.numel(), device=x.device)
    nth -= (tiles.cumsum(0) - tiles)[term_of_tile]
    in_size = x.shape[1]
    offset_a, offset_b = terms.offset_a[mine], terms.offset_b[mine]
    scale, out_first = terms.scale[mine], terms.out_first[mine]
    first_of_tile = first[term_of_tile] + nth * tile_rows
    row = first_of_tile.unsqueeze(1) + torch.arange(tile_rows, device=x.device)
    used = row < end[term_of_tile].unsqueeze(1)
    # Rows beyond a tile's end repeat its first row; what they compute is thrown away.
    row = torch.where(used, row, first_of_tile.unsqueeze(1))
    chunk = max(1, GATHER_ELEMENTS // (rank * max(in_size, out_size)))
    for start in range(0, term_of_tile.numel(), chunk):
        part = slice(start, start + chunk)
        term = term_of_tile[part]
        a = gather_blocks(pool, offset_a[term], rank * in_size).to(x.dtype)
        b = gather_blocks(pool, offset_b[term], rank * out_size).to(x.dtype)
        if a_transposed:
            a = a.view(-1, in_size, rank)
        else:
            a = a.view(-1, rank, in_size).transpose(1, 2)
        s = torch.bmm(x[row[part]], a)
        s *= scale[term].view(-1, 1, 1)
        delta = torch.bmm(s, b.view(-1, out_size, rank).transpose(1, 2))
        flags = used[part]
        row_used = row[part][flags]
        delta = delta[flags]
        column = out_first[term]
        if int(column.min()) == int(column.max()):
            c = int(column[0])
            out[:, c : c + out_size].index_add_(0, row_used, delta.to(out.dtype))
        else:
            where = column.unsqueeze(1).expand_as(flags)[flags].unsqueeze(1)
            where = where + torch.arange(out_size, device=x.device)
            out.index_put_((row_used.unsqueeze(1), where), delta.to(out.dtype), accumulate=True)


def gather_blocks(pool: torch.Tensor, offset: torch.Tensor, size: int) -> torch.Tensor:
    """[n, size] copies of the `size` elements at each offset of a flat pool."""
    return pool[offset.unsqueeze(1) + torch.arange(size, device=pool.device)]
