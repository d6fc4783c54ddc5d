"""The paged KV cache of all layers."""

from __future__ import annotations

import math

import torch

from .batch import AttentionBatch


class PagedKVCache:
    """Keys [L, blocks, block_size, KVH, D] of all layers and values [..., DV].

    With `latent` there is one KV head, and its values are the first DV columns of its keys.
    """

    def __init__(
        self,
        layers: int,
        blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        value_dim: int | None = None,
        latent: bool = False,
    ):
        """
        Args:
            head_dim: D of queries and keys.
            value_dim: DV; head_dim when None.
        """
        shape = (layers, blocks, block_size, kv_heads)
        self.value_dim = value_dim or head_dim
        self.latent = latent
        # Zeros, not empty: padded keys are masked, but 0 * NaN of old memory would still be NaN.
        self.k = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        if latent:
            self.v = self.k[..., : self.value_dim]
        else:
            self.v = torch.zeros(*shape, self.value_dim, dtype=dtype, device=device)

    def clear(self) -> None:
        self.k.zero_()
        self.v.zero_()

    def write(
        self, layer: int, k: torch.Tensor, v: torch.Tensor | None, batch: AttentionBatch
    ) -> None:
        """Writes a step's new k [T, KVH, D] and v [T, KVH, DV] (None with `latent`)."""
        batch.write(k, v, self.k[layer], self.v[layer])

    def read(
        self,
        layer: int,
        q: torch.Tensor,
        batch: AttentionBatch,
        scale: float | None = None,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends to what was written: `attend` without its first half."""
        if scale is None:
            scale = 1 / math.sqrt(q.shape[2])
        k, v = self.k[layer], self.v[layer]
        return batch.attend(q, k, v, scale, window, sinks, self.latent)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor | None,
        batch: AttentionBatch,
        scale: float | None = None,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes k and v to the cache, then attends.

        Args:
            q: [T, H, D] with rope applied; k: [T, KVH, D]; v: [T, KVH, DV], None with `latent`.
            scale: of q k^T; 1 / sqrt(D) when None.
            window: a token sees itself and the window - 1 before it; None: all before it.
            sinks: [H], logits that take part in the softmax of each head and add nothing.

        Returns:
            [T, H * DV]
        """
        self.write(layer, k, v, batch)
        return self.read(layer, q, batch, scale, window, sinks)
