"""Chooses the next token of each sequence, on the device of the logits, without waiting for it.

Randomness is a function of (seed, position) alone: one uniform number per draw, inverted through
the cumulative distribution in the order of ids, so a draw never depends on what else is in the
batch. Probabilities are whole multiples of 2^-46 from there on: their sums are exact in any order,
so they are the same in any batch and on any device.

The order of what changes logits is vLLM's: grammar, logit bias, penalties, min_tokens; then
temperature, min_p, top_k, and top_p of what those leave. A filter keeps every token as likely as
the last one that it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from ...kernels import least_kept
from ..host_copies import HostCopy
from ..request import TokenLogprob
from .logprobs import LogprobTensors, logprob_tensors, to_logprobs
from .sampling_batch import Draw, SamplingBatch

__all__ = ["Draw", "PendingSample", "Sample", "Sampled", "SamplingBatch", "sample"]

# A share of 1 as an integer. The sum of a vocabulary's shares stays far below 2^53, so float64
# holds it exactly.
_ONE = float(1 << 46)
# Columns whose shares are summed before one of the sums is looked into.
_CHUNK = 1024
_NEVER = float("-inf")


@dataclass
class Sample:
    """N rows' tokens, on the host."""

    tokens: list[int]
    finite: list[bool]  # False: the row's logits weren't; its token means nothing
    logprobs: list[TokenLogprob | None]  # None: not asked for


class PendingSample:
    """A sample on its way to the host."""

    def __init__(self, sampled: Sampled):
        self._sampled = sampled
        found = sampled.logprobs
        wide = [sampled.tokens, *(found.tensors() if found else ())]
        self._copy = HostCopy([*wide, sampled.finite])

    def wait(self) -> Sample:
        """Waits for the device to have got there."""
        tokens, *shown, finite = self._copy.wait()
        batch = self._sampled.batch
        logprobs: list[TokenLogprob | None] = [None] * batch.size
        if shown:
            for row, entry in zip(batch.shown, to_logprobs(shown, batch.top), strict=True):
                logprobs[row] = entry
        return Sample(tokens.tolist(), finite.tolist(), logprobs)


@dataclass
class Sampled:
    """N rows' tokens, on the device.

    Attributes:
        tokens: int64 [N], always ids of the vocabulary.
        finite: bool [N], whether the row's logits were.
        logprobs: of the rows in `batch.shown`; None: nobody asks.
    """

    batch: SamplingBatch
    tokens: torch.Tensor
    finite: torch.Tensor
    logprobs: LogprobTensors | None = None

    def fetch(self) -> PendingSample:
        """Starts the copy to the host, behind the work that is queued on this stream."""
        return PendingSample(self)

    def to_host(self) -> Sample:
        return self.fetch().wait()


@torch.inference_mode()
def sample(logits: torch.Tensor, batch: SamplingBatch) -> Sampled:
    """Picks one token per row.

    Args:
        logits: float32 [N, V], contiguous; overwritten.
        batch: of the same N rows and V columns.
    """
    finite = logits.isfinite().all(dim=-1)
    shown = None
    if batch.logprob_rows is not None:
        shown = logits.index_select(0, batch.logprob_rows)
    _edit(logits, batch)
    tokens = logits.argmax(dim=-1)
    if batch.random_rows is not None:
        tokens.index_copy_(0, batch.random_rows, _draw(logits, batch))
    logprobs = None
    if shown is not None and batch.logprob_rows is not None:
        ids = tokens.index_select(0, batch.logprob_rows)
        logprobs = logprob_tensors(shown, ids, max(batch.top))
    return Sampled(batch, tokens, finite, logprobs)


def _edit(logits: torch.Tensor, batch: SamplingBatch) -> None:
    if batch.mask_rows is not None and batch.masks is not None:
        bits = torch.arange(32, dtype=torch.int32, device=logits.device)
        allowed = ((batch.masks[:, :, None] >> bits) & 1).flatten(1)[:, : logits.shape[1]] != 0
        rows = logits.index_select(0, batch.mask_rows)
        logits.index_copy_(0, batch.mask_rows, rows.masked_fill(~allowed, _NEVER))
    flat = logits.view(-1)
    if batch.bias is not None:
        flat.index_add_(0, batch.bias.index, batch.bias.values)
    if (p := batch.penalties) is not None:
        values = flat.index_select(0, p.index)
        values = torch.where(values > 0, values / p.repetition, values * p.repetition)
        flat.index_copy_(0, p.index, values - p.subtracted)
    if batch.banned is not None:
        flat.index_fill_(0, batch.banned, _NEVER)


def _draw(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Tokens of the random rows, int64 [R]."""
    assert batch.random_rows is not None
    assert batch.temperature is not None
    assert batch.uniform is not None
    logits = logits.index_select(0, batch.random_rows).div_(batch.temperature[:, None])
    if batch.min_p_rows is not None and batch.log_min_p is not None:
        rows = logits.index_select(0, batch.min_p_rows)
        floor = rows.amax(dim=-1, keepdim=True) + batch.log_min_p[:, None]
        logits.index_copy_(0, batch.min_p_rows, rows.masked_fill(rows < floor, _NEVER))
    if (cut := batch.filter) is not None:
        rows = logits.index_select(0, cut.rows)
        least = least_kept(rows, cut.top_k, cut.top_p)
        logits.index_copy_(0, cut.rows, rows.masked_fill(rows < least[:, None], _NEVER))
    return _invert(logits, batch.uniform)


def _invert(logits: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF draw from each row's softmax, in the order of ids.

    Args:
        logits: float32 [R, V].
        u: float64 [R] in [0, 1).

    Returns:
        int64 [R], each the first id whose cumulative share exceeds u: never one of share 0.
    """
    vocab = logits.shape[1]
    chunks = -(-vocab // _CHUNK)
    shares = torch.softmax(logits, dim=-1).mul_(_ONE).to(torch.int64)
    shares = functional.pad(shares, (0, chunks * _CHUNK - vocab)).view(-1, chunks, _CHUNK)
    sums = shares.sum(dim=-1)
    ends = sums.cumsum(dim=-1)
    total = ends[:, -1]
    # A u just below 1 may round up to the total, beyond every token.
    target = torch.minimum((u * total).to(torch.int64), total - 1)[:, None]
    chunk = torch.searchsorted(ends, target, right=True).clamp_(max=chunks - 1)
    target = target - (ends - sums).gather(1, chunk)
    inner = shares.gather(1, chunk[:, :, None].expand(-1, -1, _CHUNK))[:, 0].cumsum(dim=-1)
    place = torch.searchsorted(inner, target, right=True).clamp_(max=_CHUNK - 1)
    # Rows that aren't finite hold anything; their token must still be one.
    return (chunk * _CHUNK + place).clamp_(max=vocab - 1)[:, 0]
