"""Layers that the model families are put together from: one rank's part of each.

Weights are plain tensors, cut by `models.loading`. Activations are [T, H], T tokens of the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...kernels import LoraBatch, MoeRunner, MoeWeights, lora_linear
from ..attention import AttentionBatch, PagedBatch, PagedKVCache
from ..comm import Comm
from ..pool.adapter_pool import AdapterPool
from ..shard import Shard
from .rope import RotaryEmbedding
from .routing import Routing


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., N] normalised in float32, scaled by weight [N]."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


@dataclass(frozen=True)
class StepContext:
    """What every layer reads of one step.

    `lora` is None when no token has an adapter. `padding`, bool [T, 1], names rows that stand for
    no token: experts leave them out. None: there are none.
    """

    cos: torch.Tensor  # [T, 1, D]
    sin: torch.Tensor  # [T, 1, D]
    attention: AttentionBatch
    cache: PagedKVCache
    pool: AdapterPool
    lora: LoraBatch | None
    padding: torch.Tensor | None = None


@dataclass(frozen=True)
class HeadNorm:
    """RMS norm of each head alone, all heads with the same weights [D]."""

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    eps: float

    def __call__(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        d = self.q_weight.shape[0]
        heads_q, heads_k = q.reshape(q.shape[0], -1, d), k.reshape(k.shape[0], -1, d)
        q_out = rms_norm(heads_q, self.q_weight, self.eps)
        return q_out, rms_norm(heads_k, self.k_weight, self.eps)


@dataclass(frozen=True)
class WholeNorm:
    """RMS norm over all heads together, with weights of this rank's part, [q] and [kv].

    The mean square needs every rank's part: one small all-reduce. KV heads that are repeated are
    repeated equally often, which leaves the mean as it is.
    """

    comm: Comm
    q_weight: torch.Tensor
    k_weight: torch.Tensor
    eps: float

    def __call__(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.comm.size == 1:
            return rms_norm(q, self.q_weight, self.eps), rms_norm(k, self.k_weight, self.eps)
        x, y = q.float(), k.float()
        squares = torch.stack([x.square().mean(-1), y.square().mean(-1)], dim=-1)  # [T, 2]
        squares = self.comm.all_reduce(squares) / self.comm.size
        scale = torch.rsqrt(squares + self.eps)
        x = x * scale[:, :1] * self.q_weight.float()
        y = y * scale[:, 1:] * self.k_weight.float()
        return x.to(q.dtype), y.to(k.dtype)


QkNorm = HeadNorm | WholeNorm  # of a rank's q [T, q] and k [T, kv] before they are rotated


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention over the paged cache, with LoRA on q, k, v and o.

    `window` is in tokens, None: all before; `sinks` are logits of this rank's heads.
    """

    shard: Shard
    comm: Comm
    qkv: torch.Tensor  # [q + 2 kv, H]
    qkv_bias: torch.Tensor | None  # [q + 2 kv]
    o: torch.Tensor  # [H, q]
    o_bias: torch.Tensor | None  # [H]; on one rank only, for it is summed over them
    norm: QkNorm | None
    window: int | None
    sinks: torch.Tensor | None = None  # [heads]

    def __call__(self, n: int, h: torch.Tensor, step: StepContext) -> torch.Tensor:
        q = self._prepare(
            n, lora_linear(h, self.qkv, self.qkv_bias, step.pool.dense[n]["qkv"], step.lora), step
        )
        o = step.cache.read(n, q, step.attention, window=self.window, sinks=self.sinks)
        y = lora_linear(o, self.o, self.o_bias, step.pool.dense[n]["o"], step.lora)
        return self.comm.all_reduce(y)

    def _prepare(self, n: int, qkv: torch.Tensor, step: StepContext) -> torch.Tensor:
        """q [T, heads, D], normed and rotated; k, treated alike, and v are in the cache then."""
        batch, cache, norm = step.attention, step.cache, self.norm
        if isinstance(batch, PagedBatch) and not isinstance(norm, WholeNorm):
            weights = (
                (None, None, 0.0) if norm is None else (norm.q_weight, norm.k_weight, norm.eps)
            )
            return batch.prepare(qkv, cache.k[n], cache.v[n], step.cos, step.sin, *weights)
        s, t, d = self.shard, qkv.shape[0], self.shard.model.head_dim
        q, k, v = qkv.split((s.q_size, s.kv_size, s.kv_size), dim=-1)
        if norm is not None:
            q, k = norm(q, k)
        q = RotaryEmbedding.apply(q.reshape(t, -1, d), step.cos, step.sin)
        k = RotaryEmbedding.apply(k.reshape(t, -1, d), step.cos, step.sin)
        cache.write(n, k, v.reshape(t, -1, d), batch)
        return q


@dataclass(frozen=True)
class Mlp:
    """What every token goes through: shared experts, or the whole of a layer without experts."""

    gate_up: torch.Tensor  # [2 I, H]
    down: torch.Tensor  # [H, I]
    gate: torch.Tensor | None = None  # [1, H], weighs the output where a family has that

    def __call__(self, n: int, h: torch.Tensor, step: StepContext) -> torch.Tensor:
        """This rank's part of the sum."""
        gate_up = lora_linear(h, self.gate_up, None, step.pool.dense[n]["gate_up"], step.lora)
        gate, up = gate_up.chunk(2, dim=-1)
        y = lora_linear(F.silu(gate) * up, self.down, None, step.pool.dense[n]["down"], step.lora)
        return y if self.gate is None else torch.sigmoid(F.linear(h, self.gate)) * y


@dataclass(frozen=True)
class DenseBlock:
    """The MLP of a layer without experts."""

    comm: Comm
    mlp: Mlp

    def __call__(self, n: int, h: torch.Tensor, step: StepContext) -> torch.Tensor:
        return self.comm.all_reduce(self.mlp(n, h, step))


@dataclass(frozen=True)
class MoeBlock:
    """Routed experts, and the shared ones of families that have them.

    Activations are the same on all ranks. Each adds what its part of its experts gives; one
    all-reduce sums it up.
    """

    comm: Comm
    runner: MoeRunner
    router: torch.Tensor  # [E, H], in the dtype that logits are wanted in
    experts: MoeWeights
    routing: Routing
    shared: Mlp | None = None
    router_bias: torch.Tensor | None = None  # [E]
    # int32 [E], each expert's number on this rank, -1 where it isn't; None: all are, as numbered.
    local_ids: torch.Tensor | None = None

    def __call__(self, n: int, h: torch.Tensor, step: StepContext) -> torch.Tensor:
        logits = F.linear(h.to(self.router.dtype), self.router, self.router_bias)
        if self.local_ids is None:
            weights, ids = self.routing(logits, step.padding)
        else:
            weights, ids = self.routing(logits)
            ids = self.local_ids.index_select(0, ids.reshape(-1)).view(ids.shape)
            if step.padding is not None:
                ids = ids.masked_fill(step.padding, -1)
        y = self.runner(h, self.experts, weights, ids, step.pool.experts[n], step.lora)
        if self.shared is not None:
            y = y + self.shared(n, h, step)
        return self.comm.all_reduce(y)
