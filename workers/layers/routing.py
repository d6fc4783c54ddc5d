"""Which experts a token goes to, from the router's logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ...kernels import softmax_topk
from ..deepseek_config import RoutingGroups


class Routing(Protocol):
    """logits [T, E] -> weights float32 [T, K] and expert ids int32 [T, K].

    `padding`, bool [T, 1], names rows that stand for no token: their ids are -1.
    """

    def __call__(
        self, logits: torch.Tensor, padding: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class SoftmaxRouting:
    """The most likely experts of all."""

    top_k: int
    renormalise: bool

    def __call__(
        self, logits: torch.Tensor, padding: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return softmax_topk(logits, self.top_k, self.renormalise, padding)


@dataclass(frozen=True)
class GroupRouting:
    """DeepSeek's: the best experts of the best groups, their weights scaled.

    V2: arXiv 2405.04434, section 2.2; V3: arXiv 2412.19437, section 2.1.2.
    """

    top_k: int
    renormalise: bool
    groups: RoutingGroups
    bias: torch.Tensor | None  # float32 [E], counts in the choice alone

    def __call__(
        self, logits: torch.Tensor, padding: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        limits, x = self.groups, logits.float()
        scores = x.sigmoid() if limits.scores == "sigmoid" else x.softmax(dim=-1)
        choice = scores if self.bias is None else scores + self.bias
        if limits.groups > 1:
            by_group = choice.unflatten(-1, (limits.groups, -1))  # [T, groups, E / groups]
            worth = by_group.topk(limits.counted, dim=-1).values.sum(dim=-1)
            best = worth.topk(limits.chosen, dim=-1).indices
            excluded = torch.ones_like(worth, dtype=torch.bool).scatter(-1, best, False)
            choice = by_group.masked_fill(excluded[..., None], float("-inf")).flatten(-2)
        ids = choice.topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, ids)
        if self.renormalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        ids = ids.to(torch.int32)
        if padding is not None:
            ids = ids.masked_fill(padding, -1)
        return weights * limits.scaling, ids
