"""Rows for `least_kept`, and what any answer to them must fulfil."""

from __future__ import annotations

import random

import torch


def random_rows(n: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of many shapes, with equals, neighbours and -inf among them; top_k and top_p."""
    rng = random.Random()
    logits = (
        torch.randn(n, vocab) * torch.tensor([rng.choice([0.01, 1, 9]) for _ in range(n)])[:, None]
    )
    for row in logits:
        kind = rng.randrange(6)
        if kind == 0:
            row.round_()
        elif kind == 1:
            row[torch.randperm(vocab)[: vocab * 2 // 3]] = float("-inf")
        elif kind == 2:
            row -= 40.0
        elif kind == 3:
            row.fill_(rng.choice([0.0, -0.0, 1e-40, -3.5]))
        elif kind == 4:  # neighbours in float32, on both sides of 0 or of 2
            steps = torch.randperm(vocab).to(torch.int32) - vocab // 2
            if rng.random() < 0.5:
                row.copy_((steps + torch.tensor(2.0).view(torch.int32)).view(torch.float32))
            else:
                row.copy_(steps.abs().view(torch.float32) * steps.sign())
    top_k = torch.tensor([rng.choice([1, 2, 17, vocab // 2 + 1, vocab]) for _ in range(n)])
    top_p = torch.tensor(
        [rng.choice([1e-9, 0.1, 0.5, 0.99, 1.0]) for _ in range(n)], dtype=torch.float64
    )
    return logits, top_k.clamp(max=vocab), top_p


def check(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, least: torch.Tensor
) -> None:
    """By the definition, in float64, for what lies more than rounding away from the border."""
    tolerance = 1e-5
    for row, k, p, cut in zip(logits, top_k.tolist(), top_p.tolist(), least.tolist(), strict=True):
        kth = row.sort(descending=True).values[k - 1]
        left = row[row >= kth].double()
        kept = left[left >= cut]
        assert len(kept), "the likeliest always stays"
        if p >= 1:
            assert len(kept) == len(left)
            continue
        weights = (left - left.max()).exp()
        weights /= weights.sum()
        assert weights[left >= cut].sum() >= p - tolerance
        assert weights[left > kept.min()].sum() < p + tolerance, "fewer would have been enough"
        assert (row >= cut).sum() == len(kept), "what top_k took away is back"
