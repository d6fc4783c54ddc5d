"""Pieces of a stored adapter scattered by a kernel, against the reference."""

from __future__ import annotations

import random

import pytest
import torch
from loraplex.kernels import scatter_pieces_reference
from loraplex.kernels.gpu import scatter_pieces_

from ..pieces import random_pieces
from .layers import interpreted

pytestmark = interpreted
TYPES = (torch.float32, torch.float16)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("packed", TYPES)
def test_as_the_reference_does(packed, dtype, flat):
    staged, pool, pieces = random_pieces(random.Random(), 9, flat)
    staged, pool = (staged * (1e5 if packed == torch.float32 else 1)).to(packed), pool.to(dtype)
    expected = scatter_pieces_reference(pool, staged, pieces)
    scatter_pieces_(pool, staged, pieces, flat)
    assert torch.equal(pool.isnan(), expected.isnan())
    assert torch.equal(pool.nan_to_num(), expected.nan_to_num())
