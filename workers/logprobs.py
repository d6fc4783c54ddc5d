"""Log-probabilities of chosen tokens: computed on the device now, read on the host later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from .request import TokenLogprob


@dataclass(frozen=True)
class LogprobRows:
    """N tokens' log-probabilities on the device, with the likeliest `top[i]` beside each."""

    TENSORS: ClassVar[int] = 5

    top: list[int]
    tensors: list[torch.Tensor]  # ids [N], own float32 [N], rank [N], values and indices [N, M]

    @classmethod
    def of(cls, logits: torch.Tensor, ids: torch.Tensor, top: Sequence[int]) -> LogprobRows:
        """
        Args:
            logits: float32 [N, V], unscaled and unfiltered.
            ids: int64 [N].
        """
        logprobs = torch.log_softmax(logits, dim=-1)
        own = logprobs.gather(1, ids[:, None])
        rank = (logprobs > own).sum(dim=-1) + 1
        values, indices = logprobs.topk(max(*top, 1, 1), dim=-1)
        return cls(list(top), [ids, own[:, 0], rank, values, indices])


def read_logprobs(top: Sequence[int], arrays: Sequence[np.ndarray]) -> list[TokenLogprob]:
    """What `LogprobRows.tensors` came to."""
    ids, own, rank, values, indices = (a.tolist() for a in arrays)
    return [
        TokenLogprob(token, p, r, tuple(zip(ix[:n], v[:n], strict=True)))
        for token, p, r, ix, v, n in zip(ids, own, rank, indices, values, top, strict=True)
    ]
