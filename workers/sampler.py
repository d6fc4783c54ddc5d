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
    # Filtered rows are inverted in order of likelihood, the others in order of ids: apart, so
    # that a row's draw doesn't hang on what its neighbours ask for.
    for filtered in (False, True):
        rows = [
            i
            for i, d in enumerate(draws)
            if d.params.temperature > 0 and (d.params.top_k > 0 or d.params.top_p < 1) == filtered
        ]
        if rows:
            invert = _invert_filtered if filtered else _invert
            params = [draws[i].params for i in rows]
            # In float32 a number just below 1 would become 1, beyond every token.
            u = torch.tensor(
                [uniform(draws[i].params.seed, draws[i].position) for i in rows],
                dtype=torch.float64,
            )
            chosen[rows] = invert(_scaled(logits[rows], params), u.to(logits.device), params)
    return chosen


def _scaled(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    temperature = torch.tensor([p.temperature for p in params], device=logits.device)
    # In float32 a temperature of 1e-6 would overflow; such rows are greedy to rounding anyway.
    return logits / temperature.clamp(min=1e-4)[:, None]


def _invert(logits: torch.Tensor, u: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Inverse-CDF draw from each row's softmax. float32 [N, V], float64 [N] -> int64 [N]."""
    return _search(torch.softmax(logits, dim=-1), u)


def _invert_filtered(
    logits: torch.Tensor, u: torch.Tensor, params: list[SamplingParams]
) -> torch.Tensor:
    """As `_invert`, of what top_k and top_p leave; the likeliest token always stays."""
    # A stable sort, so that ties fall the same way whatever the batch.
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = torch.softmax(ordered, dim=-1)
    vocab = logits.shape[-1]
    top_p = torch.tensor([p.top_p for p in params], device=logits.device)
    top_k = torch.tensor([p.top_k or vocab for p in params], device=logits.device)
    before = probs.cumsum(dim=-1) - probs
    place = torch.arange(vocab, device=logits.device)
    keep = (place[None] < top_k[:, None]) & (before < top_p[:, None])
    keep[:, 0] = True
    index = _search(torch.where(keep, probs, 0.0), u)
    return order.gather(1, index[:, None])[:, 0]


def _search(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """First index of each row whose cumulative share exceeds u: never one of weight 0."""
    cdf = weights.double().cumsum(dim=-1)
    target = u[:, None] * cdf[:, -1:]
    found = torch.searchsorted(cdf, target, right=True)
    return found.clamp(max=weights.shape[-1] - 1)[:, 0]


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
