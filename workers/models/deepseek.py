"""DeepSeek-V2 and V3: latent attention, dense layers first, then routed and shared experts."""

from __future__ import annotations

import torch

from ..config import ModelConfig
from ..deepseek_config import LatentSizes, RoutingGroups
from ..errors import WorkerError
from ..latent_attention import LatentAttention
from ..layers import MoeBlock
from ..routing import GroupRouting
from .decoder import DecoderLayer
from .loading import Loader


def load_layer(loader: Loader, n: int) -> DecoderLayer:
    ck, p = loader.checkpoint, f"model.layers.{n}."
    latent, groups = _parts(loader.config)
    moe = n >= loader.config.dense_layers
    return DecoderLayer(
        input_norm=ck.get(p + "input_layernorm.weight"),
        attention=_attention(loader, p + "self_attn.", latent),
        post_norm=ck.get(p + "post_attention_layernorm.weight"),
        moe=_experts(loader, p + "mlp.", groups) if moe else loader.dense(p + "mlp."),
    )


def _parts(config: ModelConfig) -> tuple[LatentSizes, RoutingGroups]:
    if config.latent is None or config.routing_groups is None:
        raise WorkerError(f"{config.model_type} needs latent sizes and routing groups")
    return config.latent, config.routing_groups


def _attention(loader: Loader, prefix: str, latent: LatentSizes) -> LatentAttention:
    ck, shard = loader.checkpoint, loader.shard

    def rows(name: str) -> torch.Tensor:
        return ck.get(f"{prefix}{name}.weight", rows=slice(*shard.rows(name)))

    from_latent = latent.q_rank is not None
    up = rows("kv_b_proj").view(shard.heads, latent.nope + latent.value, latent.kv_rank)
    k_up, v_up = up.split((latent.nope, latent.value), dim=1)
    o = ck.get(f"{prefix}o_proj.weight", cols=slice(*shard.rows("o_proj")))
    return LatentAttention(
        comm=loader.comm,
        qkv=torch.cat([rows("q_a_proj" if from_latent else "q_proj"), rows("kv_a_proj_with_mqa")]),
        q_norm=ck.get(f"{prefix}q_a_layernorm.weight") if from_latent else None,
        q_b=rows("q_b_proj") if from_latent else None,
        kv_norm=ck.get(f"{prefix}kv_a_layernorm.weight"),
        k_up=k_up.contiguous(),
        v_up=v_up.transpose(1, 2).contiguous(),
        o=o.contiguous(),
        scale=latent.softmax_scale,
    )


def _experts(loader: Loader, prefix: str, groups: RoutingGroups) -> MoeBlock:
    ck, m = loader.checkpoint, loader.config
    bias = None
    if groups.scores == "sigmoid":
        bias = ck.get(f"{prefix}gate.e_score_correction_bias", dtype=torch.float32)
    shared = None
    if m.shared_expert_size:
        shared = loader.mlp(f"{prefix}shared_experts.", "shared_experts")
    return loader.moe(
        prefix,
        shared=shared,
        routing=GroupRouting(m.top_k, m.norm_topk_prob, groups, bias),
        router_dtype=torch.float32,  # experts are close to each other: rounding would swap them
    )
