"""Addition and norm in one launch, against torch."""

from __future__ import annotations

import pytest
import torch
from loraplex.kernels import add_rms_norm_ as by_torch
from loraplex.kernels.gpu import add_rms_norm_

from ..poison import poisoned_memory
from .layers import TOLERANCE, interpreted

pytestmark = interpreted


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("rows", "n"), [(1, 16), (5, 100), (3, 2880), (0, 16)])
def test_as_torch_does(rows, n, adds, dtype):
    x, y = (torch.randn(rows, n).to(dtype) * 3 for _ in range(2))
    weight = torch.randn(n).to(dtype)
    mine = x.clone()
    with poisoned_memory():
        got = add_rms_norm_(mine, y if adds else None, weight, 1e-2)
    total = x + y if adds else x
    mean_square = total.double().square().mean(-1, keepdim=True)
    wanted = total.double() / (mean_square + 1e-2).sqrt() * weight.double()
    tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    assert torch.equal(mine, total)
    torch.testing.assert_close(got.double(), wanted, **tolerance)
    theirs = x.clone()
    torch.testing.assert_close(
        by_torch(theirs, y if adds else None, weight, 1e-2), got, **tolerance
    )
    assert torch.equal(theirs, total)


def test_what_would_be_misread_is_refused():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"weight must have shape \[8\]"):
        by_torch(x, None, torch.ones(7), 1e-5)
    with pytest.raises(ValueError, match=r"y must have shape \[2, 8\]"):
        by_torch(x, torch.randn(8), torch.ones(8), 1e-5)
