"""Random pieces of a staged layer, for tests of `scatter_pieces_`."""

from __future__ import annotations

import random

import torch


def random_pieces(
    rng: random.Random, count: int, flat: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values of the staged elements, what the pool holds before, and pieces with gaps between."""
    rows, staged, place = [], 0, 0
    for _ in range(count):
        unit = 8 if flat else 1
        columns = unit * rng.choice([0, 1, 3, 5])
        stored = columns if flat and columns else columns + unit * rng.choice([0, 1, 7])
        stored = stored or unit
        size = stored * rng.choice([1, 2, 13, 300])
        staged += unit * rng.randrange(3)
        place += unit * rng.randrange(3)
        rows.append((staged, place, size, columns, stored))
        staged += size // stored * columns
        place += size
    rng.shuffle(rows)
    pool = torch.full((place + 3,), torch.nan)
    return torch.randn(staged + 1) * 10, pool, torch.tensor(rows, dtype=torch.int64).view(-1, 5)
