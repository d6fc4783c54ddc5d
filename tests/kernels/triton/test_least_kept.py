"""The Triton kernel cuts rows as the definition says."""

from __future__ import annotations

import pytest
import torch
from loraplex.kernels import gpu
from loraplex.kernels import least_kept as on_cpu

from ..cuts import check, random_rows
from .layers import interpreted

pytestmark = interpreted


@pytest.mark.parametrize("vocab", [1, 40, 4096, 5000])
def test_rows_are_cut_by_definition(vocab):
    logits, top_k, top_p = random_rows(40, vocab)
    least = gpu.least_kept(logits, top_k, top_p)
    check(logits, top_k, top_p, least)
    # Rounding apart, both keep the same.
    other = on_cpu(logits, top_k, top_p)
    same = (logits >= least[:, None]) == (logits >= other[:, None])
    assert torch.sum(~same.all(dim=-1)) <= 2
