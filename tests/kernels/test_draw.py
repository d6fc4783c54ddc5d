"""Draws invert the cumulative distribution, and are the same in any batch."""

from __future__ import annotations

import pytest
import torch
from loraplex.kernels import draw

from .draws import check, random_draws


@pytest.mark.parametrize("vocab", [1, 3, 1000, 1024, 1025, 5000])
def test_a_draw_is_where_its_number_falls(vocab):
    logits, rows, temperature = random_draws(60, vocab)
    uniform = torch.rand(60, dtype=torch.float64)
    check(logits, uniform, rows, temperature, draw(logits, uniform, rows, temperature))


def test_a_row_draws_the_same_alone_and_with_neither_rows_nor_temperature():
    logits, _, _ = random_draws(20, 700)
    n = len(logits)
    uniform = torch.rand(n, dtype=torch.float64)
    together = draw(logits, uniform)
    assert torch.equal(together, draw(logits, uniform, torch.arange(n), torch.ones(n)))
    alone = [draw(logits[i : i + 1], uniform[i : i + 1]) for i in range(n)]
    assert torch.equal(together, torch.cat(alone))


def test_the_ends_of_the_unit_interval_are_tokens_of_some_share():
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).repeat(2, 1)
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniform).tolist() == [1, 2]


def test_rows_that_are_not_finite_give_ids_of_the_vocabulary():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[nan] * 5, [0, inf, 0, 0, 0], [-inf] * 5, [0, nan, 0, 0, 0]])
    drawn = draw(logits, torch.full((4,), 0.7, dtype=torch.float64))
    assert ((drawn >= 0) & (drawn < 5)).all()
