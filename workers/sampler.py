"""Chooses the next token of each sequence. Everything runs on the device of the logits.

Randomness is a function of (seed, position) alone: one uniform number per draw, inverted through
the cumulative distribution, so a draw never depends on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .request import SamplingParams, TokenLogprob

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position): splitmix64's finaliser over both.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & _MASK
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


@dataclass
class Draw:
    """One row to sample: its parameters, and the position of the token being chosen.

    `banned` ids can't be chosen (end-of-sequence ids before min_tokens).
    """

    params: SamplingParams
    position: int
    banned: tuple[int, ...] = ()


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Picks one token per row.

    Args:
        logits: float32 [N, V]; rows with banned ids are changed in place.

    Returns:
        int64 [N]
    """
    for row, draw in enumerate(draws):
        if draw.banned:
            logits[row, list(draw.banned)] = float("-inf")
    chosen = logits.argmax(dim=-1)
    rows = [i for i, d in enumerate(draws) if d.params.temperature > 0]
    if not rows:
        return chosen
    device = logits.device
    params = [draws[i].params for i in rows]
    temperature = torch.tensor([p.temperature for p in params], device=device)
    # In float32 a temperature of 1e-6 would overflow; such rows are greedy to rounding anyway.
    scaled = logits[rows] / temperature.clamp(min=1e-4)[:, None]
    u = torch.tensor([uniform(draws[i].params.seed, draws[i].position) for i in rows])
    drawn = _invert(scaled, u.to(device), params)
    chosen[rows] = drawn
    return chosen


def _invert(logits: torch.Tensor, u: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Inverse-CDF draw from each filtered row. float32 [N, V], float [N] -> int64 [N]."""
    if all(p.top_k == 0 and p.top_p >= 1 for p in params):
        order = None
        probs = torch.softmax(logits, dim=-1)
    else:
        # A stable sort, so that ties fall the same way whatever the batch.
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probs = torch.softmax(ordered, dim=-1)
        top_p = torch.tensor([p.top_p for p in params], device=logits.device)
        vocab = logits.shape[-1]
        top_k = torch.tensor([p.top_k or vocab for p in params], device=logits.device)
        before = probs.cumsum(dim=-1) - probs
        place = torch.arange(vocab, device=logits.device)
        keep = (place[None] < top_k[:, None]) & (before < top_p[:, None])
        keep[:, 0] = True
        probs = torch.where(keep, probs, 0.0)
    cdf = probs.double().cumsum(dim=-1)
    target = u.double()[:, None] * cdf[:, -1:]
    # First index whose cdf exceeds the target: never one of probability 0.
    index = torch.searchsorted(cdf, target, right=True).clamp(max=logits.shape[-1] - 1)
    if order is not None:
        index = order.gather(1, index)
    return index[:, 0]


def token_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], top: Sequence[int]
) -> list[TokenLogprob]:
    """Log-probabilities of given tokens, and the `top[i]` likeliest beside each.

    Args:
        logits: float32 [N, V], unscaled and unfiltered.
        token_ids: N ids.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    ids = torch.tensor(token_ids, device=logits.device)[:, None]
    own = logprobs.gather(1, ids)
    rank = (logprobs > own).sum(dim=-1) + 1
    values, indices = logprobs.topk(max(*top, 1, 1), dim=-1)
    out = []
    for i, (p, r, v, ix) in enumerate(
        zip(own[:, 0].tolist(), rank.tolist(), values.tolist(), indices.tolist(), strict=True)
    ):
        likeliest = tuple(zip(ix[: top[i]], v[: top[i]], strict=True))
        out.append(TokenLogprob(token_ids[i], p, r, likeliest))
    return out
