"""Where top-k and top-p cut a row of logits: the smallest logit that they keep.

A token's share is exp(logit - the row's largest) in whole multiples of 2^-40, so sums are exact in
any order and a row's cut doesn't depend on what is computed beside it.
"""

from __future__ import annotations

import torch

from .backends import gpu

ONE = 1 << 40  # the share of the likeliest; a vocabulary's sum stays below 2^63
# Candidates that are looked at before a row is sorted whole.
FEW = 256


def least_kept(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """A number between the logits that stay and those that go.

    top_k keeps the k largest logits, and every one that equals the smallest of them. Of what that
    leaves, top_p keeps the fewest of the largest whose shares sum to p, and their equals.

    Args:
        logits: float32 [N, V], contiguous; -inf is allowed.
        top_k: int64 [N], 1 to V; V keeps all.
        top_p: float64 [N], above 0; 1 keeps all.

    Returns:
        float32 [N]: logits at least as large stay.
    """
    if logits.device.type != "cpu":
        return gpu().least_kept(logits, top_k, top_p)
    cut, known = _cut(logits, top_k, top_p, min(FEW, logits.shape[1]))
    if not known.all():
        rest = (~known).nonzero()[:, 0]
        cut[rest], _ = _cut(logits[rest], top_k[rest], top_p[rest], logits.shape[1])
    return cut


def _cut(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`least_kept` from the `width` largest logits, and for which rows that is enough."""
    vocab = logits.shape[1]
    largest = logits.topk(width, dim=-1).values
    best = largest[:, :1]
    kth = largest.gather(1, (top_k[:, None] - 1).clamp(max=width - 1))
    kth = kth.masked_fill((top_k == vocab)[:, None], float("-inf"))
    total = _shares(logits, best).masked_fill(logits < kth, 0).sum(dim=-1, keepdim=True)
    enough = _shares(largest, best).cumsum(dim=-1) >= top_p[:, None] * total
    place = enough.to(torch.int8).argmax(dim=-1, keepdim=True)  # the first of them
    all_ = top_p >= 1
    cut = torch.where(all_[:, None], kth, torch.maximum(largest.gather(1, place), kth))
    known = ((top_k <= width) | (top_k == vocab)) & (all_ | enough[:, -1])
    return cut[:, 0], known


def _shares(logits: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    return (logits - best).exp_().mul_(ONE).to(torch.int64)
