"""Qwen3-MoE: one rank's part of the model, run on a batch of tokens from many sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...kernels import LoraBatch, MoeRunner, MoeWeights, lora_linear_
from ..adapter_pool import AdapterPool
from ..attention import AttentionBatch, PagedKVCache
from ..comm import Comm
from ..config import ModelConfig
from ..layers import RotaryEmbedding, rms_norm, route
from ..shard import Shard
from ..weights import Checkpoint


@dataclass
class _Layer:
    input_norm: torch.Tensor  # [H]
    qkv: torch.Tensor  # [q + 2 kv, H]
    q_norm: torch.Tensor  # [D]
    k_norm: torch.Tensor  # [D]
    o: torch.Tensor  # [H, q]
    post_norm: torch.Tensor  # [H]
    router: torch.Tensor  # [E, H]
    experts: MoeWeights


class Qwen3Moe:
    """Weights of one rank and the forward pass. Activations are [T, H], T tokens of the step."""

    def __init__(
        self,
        config: ModelConfig,
        shard: Shard,
        checkpoint: Checkpoint,
        comm: Comm,
        runner: MoeRunner,
        max_positions: int,
        device: torch.device,
    ):
        self.config, self._shard, self._comm, self._runner = config, shard, comm, runner
        self._embed = checkpoint.get("model.embed_tokens.weight")
        self._norm = checkpoint.get("model.norm.weight")
        # Only rank 0 samples, so only it needs the head.
        self._head = self._embed
        if not config.tie_word_embeddings and shard.rank == 0:
            self._head = checkpoint.get("lm_head.weight")
        self._rope = RotaryEmbedding(config.head_dim, config.rope_theta, max_positions, device)
        self._layers = [_load_layer(checkpoint, config, shard, n) for n in range(config.num_layers)]

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBatch,
        cache: PagedKVCache,
        pool: AdapterPool,
        lora: LoraBatch | None,
    ) -> torch.Tensor:
        """Hidden states after the last norm.

        Args:
            token_ids, positions: int64 [T].
            lora: the adapter slot of every token; None when no token has an adapter.

        Returns:
            [T, H]
        """
        eps = self.config.rms_norm_eps
        x = F.embedding(token_ids, self._embed)
        cos, sin = self._rope.at(positions)
        for n, layer in enumerate(self._layers):
            h = rms_norm(x, layer.input_norm, eps)
            x = x + self._attention(n, layer, h, cos, sin, attention, cache, pool, lora)
            h = rms_norm(x, layer.post_norm, eps)
            weights, ids = route(
                F.linear(h, layer.router), self.config.top_k, self.config.norm_topk_prob
            )
            y = self._runner(h, layer.experts, weights, ids, pool.experts[n], lora)
            x = x + self._comm.all_reduce(y)
        return rms_norm(x, self._norm, eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [N, vocab] of hidden states [N, H]. Rank 0 only."""
        return F.linear(hidden, self._head).float()

    def _attention(
        self,
        n: int,
        layer: _Layer,
        h: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention: AttentionBatch,
        cache: PagedKVCache,
        pool: AdapterPool,
        lora: LoraBatch | None,
    ) -> torch.Tensor:
        t, d, eps = h.shape[0], self.config.head_dim, self.config.rms_norm_eps
        s = self._shard
        qkv = F.linear(h, layer.qkv)
        if lora is not None:
            lora_linear_(qkv, h, pool.qkv[n], lora)
        q, k, v = qkv.split((s.q_size, s.kv_size, s.kv_size), dim=-1)
        # q and k take the same norm and rotation, each head with its own weight vector.
        q = self._rope.apply(rms_norm(q.reshape(t, -1, d), layer.q_norm, eps), cos, sin)
        k = self._rope.apply(rms_norm(k.reshape(t, -1, d), layer.k_norm, eps), cos, sin)
        o = cache.attend(n, q, k, v.reshape(t, -1, d), attention)
        y = F.linear(o, layer.o)
        if lora is not None:
            lora_linear_(y, o, pool.o[n], lora)
        return self._comm.all_reduce(y)


def _load_layer(ck: Checkpoint, config: ModelConfig, shard: Shard, n: int) -> _Layer:
    p = f"model.layers.{n}."
    a = p + "self_attn."
    qkv = [
        ck.get(f"{a}{name}.weight", rows=slice(*shard.rows(name)))
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    return _Layer(
        input_norm=ck.get(p + "input_layernorm.weight"),
        qkv=torch.cat(qkv),
        q_norm=ck.get(a + "q_norm.weight"),
        k_norm=ck.get(a + "k_norm.weight"),
        o=ck.get(a + "o_proj.weight", cols=slice(*shard.rows("o_proj"))).contiguous(),
        post_norm=ck.get(p + "post_attention_layernorm.weight"),
        router=ck.get(p + "mlp.gate.weight"),
        experts=_load_experts(ck, config, shard, p + "mlp.experts."),
    )


def _load_experts(ck: Checkpoint, config: ModelConfig, shard: Shard, p: str) -> MoeWeights:
    """From one tensor per expert or from fused tensors."""
    lo, hi = shard.intermediate_rows()
    if p + "gate_up_proj" in ck:
        whole = config.moe_intermediate_size
        w13 = ck.get(p + "gate_up_proj")
        w13 = torch.cat([w13[:, lo:hi], w13[:, whole + lo : whole + hi]], dim=1)
        return MoeWeights(w13.contiguous(), ck.get(p + "down_proj")[:, :, lo:hi].contiguous())
    w13, w2 = [], []
    for e in range(config.num_experts):
        gate = ck.get(f"{p}{e}.gate_proj.weight", rows=slice(lo, hi))
        up = ck.get(f"{p}{e}.up_proj.weight", rows=slice(lo, hi))
        w13.append(torch.cat([gate, up]))
        w2.append(ck.get(f"{p}{e}.down_proj.weight", cols=slice(lo, hi)))
    return MoeWeights(torch.stack(w13), torch.stack(w2))
