"""Multi-head latent attention in its absorbed form: what is cached is never expanded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels import lora_linear
from ..comm import Comm
from .blocks import StepContext, rms_norm
from .rope import RotaryEmbedding

# The published code gives these norms no epsilon of the config's, and its default is this.
_LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True)
class LatentAttention:
    """DeepSeek's attention (arXiv 2405.04434, section 2.1) over a cache of latents c [C].

    A head's key is W_k c beside a rotated key that all heads share, and its value is W_v c. So
    q^T W_k c = (W_k^T q)^T c: queries are brought to the latents, the outputs of attention are
    latents, and only those are expanded, by W_v. All heads look at one key of C + rope columns,
    whose first C are the value. The cache is the same on every rank, the heads are cut.

    LoRA is on q (or on both steps of q), on the latents' projection and on o.
    """

    comm: Comm
    qkv: torch.Tensor  # [q or q_rank, then C + rope; H]
    q_norm: torch.Tensor | None  # [q_rank]; None: q comes straight from the hidden state
    q_b: torch.Tensor | None  # [q, q_rank]
    kv_norm: torch.Tensor  # [C]
    k_up: torch.Tensor  # W_k of each head, [heads, nope, C]
    v_up: torch.Tensor  # W_v of each head, transposed, [heads, C, value]
    o: torch.Tensor  # [H, heads * value]
    scale: float  # of q k^T

    def __call__(self, n: int, h: torch.Tensor, step: StepContext) -> torch.Tensor:
        heads, _, latent = self.k_up.shape
        tables = step.pool.dense[n]
        qkv = lora_linear(h, self.qkv, None, tables["qkv"], step.lora)
        rope = step.cos.shape[-1]
        q, c, k_rope = qkv.split((qkv.shape[-1] - latent - rope, latent, rope), dim=-1)
        if self.q_norm is not None and self.q_b is not None:
            q_latent = rms_norm(q, self.q_norm, _LATENT_NORM_EPS)
            q = lora_linear(q_latent, self.q_b, None, tables["q_b"], step.lora)
        q_nope, q_rope = q.unflatten(-1, (heads, -1)).tensor_split((-rope,), dim=-1)
        to_latent = torch.bmm(q_nope.transpose(0, 1), self.k_up).transpose(0, 1)
        queries = torch.cat([to_latent, _rotated(q_rope, step)], dim=-1)  # [T, heads, C + rope]
        c = rms_norm(c, self.kv_norm, _LATENT_NORM_EPS)
        keys = torch.cat([c[:, None], _rotated(k_rope[:, None], step)], dim=-1)
        of_latents = step.cache.attend(n, queries, keys, None, step.attention, scale=self.scale)
        of_latents = of_latents.unflatten(-1, (heads, latent)).transpose(0, 1)
        values = torch.bmm(of_latents, self.v_up).transpose(0, 1).flatten(1)  # [T, heads * value]
        y = lora_linear(values, self.o, None, tables["o"], step.lora)
        return self.comm.all_reduce(y)


def _rotated(x: torch.Tensor, step: StepContext) -> torch.Tensor:
    """x [T, heads, rope], whose columns 2 i and 2 i + 1 are rotated together.

    Even ones come first in what is returned, in queries and keys alike, which leaves their products
    as they are.
    """
    halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return RotaryEmbedding.apply(halves, step.cos, step.sin)
