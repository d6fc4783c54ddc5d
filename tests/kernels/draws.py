"""Rows to draw from, and what any draw must fulfil."""

from __future__ import annotations

import random

import torch


def random_draws(n: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [n + 3, vocab] of many shapes; n rows of them, in no order; their temperatures."""
    rng = random.Random()
    logits = torch.randn(n + 3, vocab) * rng.choice([0.01, 1.0, 6.0])
    for row in logits:
        kind = rng.randrange(4)
        if kind == 0:
            row[torch.randperm(vocab)[: vocab * 2 // 3]] = float("-inf")
        elif kind == 1:
            row += 1e4
    temperature = torch.tensor([rng.choice([1e-4, 0.3, 1.0, 2.5]) for _ in range(n)])
    return logits, torch.randperm(n + 3)[:n], temperature


def check(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    rows: torch.Tensor,
    temperature: torch.Tensor,
    drawn: torch.Tensor,
) -> None:
    """By the definition, in float64: u lies within the token's own stretch of the cumulative sum,
    rounding apart."""
    assert drawn.dtype == torch.int64
    for row, u, t, token in zip(rows, uniform, temperature, drawn.tolist(), strict=True):
        shares = torch.softmax((logits[row] / t).double(), 0)
        assert shares[token] > 0
        end = shares[: token + 1].sum()
        assert end - shares[token] - 1e-6 <= u <= end + 1e-6
