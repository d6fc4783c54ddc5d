"""A token of each row, drawn from its softmax by inversion in the order of ids.

A token's share is exp((logit - the row's largest) / temperature) in whole multiples of 2^-40, so
sums are exact in any order: a draw doesn't depend on what is computed beside it, nor on how.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from .backends import gpu
from .least_kept import ONE

_CHUNK = 1024  # columns whose shares are summed before one of the sums is looked into


def draw(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    rows: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
) -> torch.Tensor:
    """The first id of each row whose cumulative share exceeds `uniform` of the row's sum.

    Args:
        logits: float32 [N, V], contiguous; -inf is allowed.
        uniform: float64 [R] in [0, 1).
        rows: int64 [R], of logits; None: all, in order.
        temperature: float32 [R], above 0; None: 1.

    Returns:
        int64 [R], never an id of share 0 unless its row isn't finite: then any id below V.
    """
    if logits.device.type != "cpu":
        return gpu().draw(logits, uniform, rows, temperature)
    vocab = logits.shape[1]
    chunks = -(-vocab // _CHUNK)
    if rows is not None:
        logits = logits.index_select(0, rows)
    if temperature is not None:
        logits = logits / temperature[:, None]
    shares = (logits - logits.amax(dim=-1, keepdim=True)).exp_().mul_(ONE).to(torch.int64)
    shares = functional.pad(shares, (0, chunks * _CHUNK - vocab)).view(-1, chunks, _CHUNK)
    sums = shares.sum(dim=-1)
    ends = sums.cumsum(dim=-1)
    total = ends[:, -1]
    # A number just below 1 may round up to the total, beyond every token.
    target = torch.minimum((uniform * total).to(torch.int64), total - 1)[:, None]
    chunk = torch.searchsorted(ends, target, right=True).clamp_(max=chunks - 1)
    target = target - (ends - sums).gather(1, chunk)
    inner = shares.gather(1, chunk[:, :, None].expand(-1, -1, _CHUNK))[:, 0].cumsum(dim=-1)
    place = torch.searchsorted(inner, target, right=True).clamp_(max=_CHUNK - 1)
    # Rows that aren't finite hold anything; their token must still be one.
    return (chunk * _CHUNK + place).clamp_(min=0, max=vocab - 1)[:, 0]
