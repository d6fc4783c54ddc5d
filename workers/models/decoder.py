"""The frame that all families share: embedding, layers with two residual branches, norm, head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from ...kernels import LoraBatch, add_rms_norm_
from ..attention import AttentionBatch, PagedKVCache
from ..layers.blocks import StepContext
from ..layers.rope import RotaryEmbedding
from ..pool.adapter_pool import AdapterPool


class Branch(Protocol):
    """What is added to the hidden states [T, H] of layer `n`: attention, experts or an MLP."""

    def __call__(self, n: int, h: torch.Tensor, step: StepContext) -> torch.Tensor: ...


@dataclass(frozen=True)
class DecoderLayer:
    input_norm: torch.Tensor  # [H]
    attention: Branch
    post_norm: torch.Tensor  # [H]
    moe: Branch  # or, in a layer without experts, its MLP


@dataclass(frozen=True)
class Decoder:
    """Weights of one rank and the forward pass."""

    embed: torch.Tensor  # [vocab, H]
    layers: Sequence[DecoderLayer]
    norm: torch.Tensor  # [H]
    head: torch.Tensor  # [vocab, H]; rank 0 alone reads it
    rope: RotaryEmbedding
    eps: float

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBatch,
        cache: PagedKVCache,
        pool: AdapterPool,
        lora: LoraBatch | None,
        padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states after the last norm.

        Args:
            token_ids, positions: int32 or int64 [T].
            lora: the adapter slot of every token; None when no token has an adapter.
            padding: bool [T, 1], rows that stand for no token; None: there are none.

        Returns:
            [T, H]
        """
        x = F.embedding(token_ids, self.embed)
        step = StepContext(*self.rope.at(positions), attention, cache, pool, lora, padding)
        # The norm behind each addition goes with it.
        after = [*(layer.input_norm for layer in self.layers[1:]), self.norm]
        h = add_rms_norm_(x, None, self.layers[0].input_norm, self.eps)
        for n, layer in enumerate(self.layers):
            pool.await_layer(n)
            h = add_rms_norm_(x, layer.attention(n, h, step), layer.post_norm, self.eps)
            h = add_rms_norm_(x, layer.moe(n, h, step), after[n], self.eps)
        return h

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [N, vocab] of hidden states [N, H]. Rank 0 only."""
        return F.linear(hidden, self.head).float()
