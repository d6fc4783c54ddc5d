"""Chooses the next token of each sequence, on the device of the logits, without waiting for it.

Randomness is a function of (seed, position) alone: one uniform number per draw, inverted through
the cumulative distribution in the order of ids, of shares whose sums are exact in any order
(`kernels.draw`): a draw never depends on what else is in the batch.

The order of what changes logits is vLLM's: grammar, logit bias, penalties, min_tokens; then
temperature, min_p, top_k, and top_p of what those leave. A filter keeps every token as likely as
the last one that it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels import draw, least_kept
from ..host_copies import HostCopy
from ..request import TokenLogprob
from .logprobs import LogprobTensors, logprob_tensors, to_logprobs
from .sampling_batch import Draw, SamplingBatch

__all__ = ["Draw", "PendingSample", "Sample", "Sampled", "SamplingBatch", "sample"]

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
    if batch.random_rows is not None and len(batch.random_rows) == batch.size:
        tokens = _draw(logits, batch)
    else:
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
    if batch.min_p_rows is None and batch.filter is None:
        return draw(logits, batch.uniform, batch.random_rows, batch.temperature)
    logits = logits.index_select(0, batch.random_rows).div_(batch.temperature[:, None])
    if batch.min_p_rows is not None and batch.log_min_p is not None:
        rows = logits.index_select(0, batch.min_p_rows)
        floor = rows.amax(dim=-1, keepdim=True) + batch.log_min_p[:, None]
        logits.index_copy_(0, batch.min_p_rows, rows.masked_fill(rows < floor, _NEVER))
    if (cut := batch.filter) is not None:
        rows = logits.index_select(0, cut.rows)
        least = least_kept(rows, cut.top_k, cut.top_p)
        logits.index_copy_(0, cut.rows, rows.masked_fill(rows < least[:, None], _NEVER))
    return draw(logits, batch.uniform)
