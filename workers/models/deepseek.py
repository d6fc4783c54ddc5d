"""DeepSeek-V2 and V3: latent attention, dense layers first, then routed and shared experts."""

from __future__ import annotations

import torch

from ..config import ModelConfig
from ..deepseek_config import LatentSizes, RoutingGroups
from ..errors import WorkerError
from ..layers.blocks import MoeBlock
from ..layers.latent_attention import LatentAttention
from ..layers.routing import GroupRouting
from .decoder import DecoderLayer
from .loading import Loader


def load_layer(loader: Loader, n: int) -> DecoderLayer:
    ck, p = loader.checkpoint, f"model.layers.{n}."
    latent, groups = _parts(loader.config)
    hidden = (loader.config.hidden_size,)
    moe = n >= loader.config.dense_layers
    return DecoderLayer(
        input_norm=ck.get(p + "input_layernorm.weight", hidden),
        attention=_attention(loader, p + "self_attn.", latent),
        post_norm=ck.get(p + "post_attention_layernorm.weight", hidden),
        moe=_experts(loader, p + "mlp.", groups) if moe else loader.dense(p + "mlp."),
    )


def _parts(config: ModelConfig) -> tuple[LatentSizes, RoutingGroups]:
    if config.latent is None or config.routing_groups is None:
        raise WorkerError(f"{config.model_type} needs latent sizes and routing groups")
    return config.latent, config.routing_groups


def _attention(loader: Loader, prefix: str, latent: LatentSizes) -> LatentAttention:
    ck, m, shard = loader.checkpoint, loader.config, loader.shard

    def rows(name: str, out: int, in_: int) -> torch.Tensor:
        return ck.get(f"{prefix}{name}.weight", (out, in_), slice(*shard.rows(name)))

    def norm(name: str, size: int) -> torch.Tensor:
        return ck.get(f"{prefix}{name}.weight", (size,))

    hidden, q_rank, kv_rank, heads = m.hidden_size, latent.q_rank, latent.kv_rank, m.num_heads
    if q_rank is None:
        q, q_norm, q_b = rows("q_proj", heads * latent.head, hidden), None, None
    else:
        q, q_norm = rows("q_a_proj", q_rank, hidden), norm("q_a_layernorm", q_rank)
        q_b = rows("q_b_proj", heads * latent.head, q_rank)
    each = latent.nope + latent.value
    up = rows("kv_b_proj", heads * each, kv_rank).view(shard.heads, each, kv_rank)
    k_up, v_up = up.split((latent.nope, latent.value), dim=1)
    cols = slice(*shard.rows("o_proj"))
    return LatentAttention(
        comm=loader.comm,
        qkv=torch.cat([q, rows("kv_a_proj_with_mqa", latent.cached, hidden)]),
        q_norm=q_norm,
        q_b=q_b,
        kv_norm=norm("kv_a_layernorm", kv_rank),
        k_up=k_up.contiguous(),
        v_up=v_up.transpose(1, 2).contiguous(),
        o=ck.get(f"{prefix}o_proj.weight", (hidden, heads * latent.value), cols=cols),
        scale=latent.softmax_scale,
    )


def _experts(loader: Loader, prefix: str, groups: RoutingGroups) -> MoeBlock:
    ck, m = loader.checkpoint, loader.config
    bias = None
    if groups.scores == "sigmoid":
        name = f"{prefix}gate.e_score_correction_bias"
        bias = ck.get(name, (m.num_experts,), dtype=torch.float32)
    shared = None
    if m.shared_expert_size:
        shared = loader.mlp(f"{prefix}shared_experts.", "shared_experts")
    return loader.moe(
        prefix,
        shared=shared,
        routing=GroupRouting(m.top_k, m.norm_topk_prob, groups, bias),
        router_dtype=torch.float32,  # experts are close to each other: rounding would swap them
    )
