"""Pieces of a stored adapter land where they belong, cast and padded, and nowhere else."""

from __future__ import annotations

import random

import pytest
import torch
from loraplex.kernels import scatter_pieces_, scatter_pieces_reference

from .pieces import random_pieces

TYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("packed", TYPES)
def test_as_the_reference_does(packed, dtype):
    staged, pool, pieces = random_pieces(random.Random(), 12, flat=False)
    staged, pool = staged.to(packed), pool.to(dtype)
    expected = scatter_pieces_reference(pool, staged, pieces)
    scatter_pieces_(pool, staged, pieces)
    assert torch.equal(pool.isnan(), expected.isnan())
    assert torch.equal(pool.nan_to_num(), expected.nan_to_num())


def test_what_float16_cant_hold_is_its_largest():
    staged = torch.tensor([1e6, -1e6, 3.0])
    pool = torch.zeros(3, dtype=torch.float16)
    scatter_pieces_(pool, staged, torch.tensor([[0, 0, 3, 1, 1]]))
    assert pool.tolist() == [65504.0, -65504.0, 3.0]


def test_what_would_be_misread_is_refused():
    pool = torch.zeros(4)
    with pytest.raises(ValueError, match=r"pieces must have shape \[any, 5\], got \[1, 4\]"):
        scatter_pieces_(pool, pool, torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"staged must be torch.float32 or .*, got torch.uint8"):
        scatter_pieces_(pool, pool.view(torch.uint8), torch.zeros(0, 5, dtype=torch.int64))
