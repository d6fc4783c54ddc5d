"""The Triton kernel draws as the definition says."""

from __future__ import annotations

import pytest
import torch
from loraplex.kernels import draw as on_cpu
from loraplex.kernels import gpu

from ..draws import check, random_draws
from .layers import interpreted

pytestmark = interpreted


@pytest.mark.parametrize("vocab", [1, 40, 4096, 9000])
def test_a_draw_is_where_its_number_falls(vocab):
    logits, rows, temperature = random_draws(25, vocab)
    uniform = torch.rand(25, dtype=torch.float64)
    drawn = gpu.draw(logits, uniform, rows, temperature)
    check(logits, uniform, rows, temperature, drawn)
    # Rounding apart, both draw the same.
    assert torch.sum(drawn != on_cpu(logits, uniform, rows, temperature)) <= 1


def test_all_rows_and_a_temperature_of_1():
    logits, _, _ = random_draws(5, 5000)
    uniform = torch.rand(8, dtype=torch.float64)
    rows, ones = torch.arange(8), torch.ones(8)
    drawn = gpu.draw(logits, uniform, None, None)
    assert torch.equal(drawn, gpu.draw(logits, uniform, rows, ones))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_ends_and_rows_that_are_not_finite():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[-inf, 0, 0, -inf], [-inf, 0, 0, -inf], [nan] * 4, [0, inf, 0, 0]])
    uniform = torch.tensor([0.0, 1 - 2**-53, 0.3, 0.6], dtype=torch.float64)
    drawn = gpu.draw(logits, uniform, None, None)
    assert drawn[:2].tolist() == [1, 2]
    assert ((drawn >= 0) & (drawn < 4)).all()
