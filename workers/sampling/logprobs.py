"""Log-probabilities of tokens, on the device of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..host_copies import HostCopy
from ..request import TokenLogprob

# Rows whose log-softmax is held at once: a prompt's chunk may have thousands, each of a vocabulary.
_ROWS = 128


@dataclass
class LogprobTensors:
    """Of N tokens: their own, and the K likeliest beside each."""

    ids: torch.Tensor  # int64 [N]
    rank: torch.Tensor  # int64 [N], 1 = most likely
    top_ids: torch.Tensor  # int64 [N, K], most likely first; of equals the lower id
    own: torch.Tensor  # float32 [N]
    top: torch.Tensor  # float32 [N, K]

    def tensors(self) -> list[torch.Tensor]:
        """Widest types first, as `HostCopy` wants them."""
        return [self.ids, self.rank, self.top_ids, self.own, self.top]


def logprob_tensors(logits: torch.Tensor, ids: torch.Tensor, top: int) -> LogprobTensors:
    """
    Args:
        logits: float32 [N, V], unscaled and unfiltered.
        ids: int64 [N].
        top: how many alternatives.
    """
    parts = [
        _rows(logits[i : i + _ROWS], ids[i : i + _ROWS], top)
        for i in range(0, max(len(logits), 1), _ROWS)
    ]
    if len(parts) == 1:
        return parts[0]
    columns = zip(*(p.tensors() for p in parts), strict=True)
    return LogprobTensors(*(torch.cat(c) for c in columns))


def _rows(logits: torch.Tensor, ids: torch.Tensor, top: int) -> LogprobTensors:
    logprobs = torch.log_softmax(logits, dim=-1)
    own = logprobs.gather(1, ids[:, None])
    rank = (logprobs > own).sum(dim=-1) + 1
    vocab = logits.shape[-1]
    if top == 0:
        nothing = ids.new_zeros((len(ids), 0))
        return LogprobTensors(ids, rank, nothing, own[:, 0], own[:, :0])
    # A float32's bits in an order that integers keep, and below them the id: no two are equal, so
    # which alternatives are shown doesn't depend on how many the neighbours ask for.
    bits = logprobs.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    keys = (ordered << 32) + (vocab - 1 - torch.arange(vocab, device=logits.device))
    best = keys.topk(min(top, vocab), dim=-1).values
    top_ids = vocab - 1 - (best & 0xFFFFFFFF)
    return LogprobTensors(ids, rank, top_ids, own[:, 0], logprobs.gather(1, top_ids))


def to_logprobs(tensors: Sequence[torch.Tensor], top: Sequence[int]) -> list[TokenLogprob]:
    """What clients get of `LogprobTensors.tensors` on the host, `top[i]` alternatives for row i."""
    ids, rank, top_ids, own, values = (t.tolist() for t in tensors)
    return [
        TokenLogprob(i, p, r, tuple(zip(ix[:k], v[:k], strict=True)))
        for i, p, r, ix, v, k in zip(ids, own, rank, top_ids, values, top, strict=True)
    ]


@torch.inference_mode()
def token_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], top: Sequence[int]
) -> list[TokenLogprob]:
    """Log-probabilities of given tokens, and the `top[i]` likeliest beside each.

    Args:
        logits: float32 [N, V], unscaled and unfiltered.
        token_ids: N ids.
    """
    ids = torch.tensor(token_ids, dtype=torch.int64, device=logits.device)
    found = logprob_tensors(logits, ids, max(top, default=0))
    return to_logprobs(HostCopy(found.tensors()).wait(), top)
