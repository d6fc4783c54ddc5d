"""Where top-k and top-p cut: by definition, and the same in any batch."""

from __future__ import annotations

import pytest
import torch
from loraplex.kernels import least_kept

from .cuts import check, random_rows


@pytest.mark.parametrize("vocab", [1, 3, 200, 256, 257, 1500])
def test_rows_are_cut_by_definition(vocab):
    logits, top_k, top_p = random_rows(80, vocab)
    check(logits, top_k, top_p, least_kept(logits, top_k, top_p))


def test_a_row_is_cut_the_same_alone():
    logits, top_k, top_p = random_rows(40, 700)
    together = least_kept(logits, top_k, top_p)
    alone = [least_kept(logits[i : i + 1], top_k[i : i + 1], top_p[i : i + 1]) for i in range(40)]
    assert torch.equal(together, torch.cat(alone))
