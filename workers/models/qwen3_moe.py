"""Qwen3-MoE: each head's q and k are normalised alone."""

from __future__ import annotations

from ..layers.blocks import HeadNorm
from .decoder import DecoderLayer
from .loading import Loader


def load_layer(loader: Loader, n: int) -> DecoderLayer:
    ck, p = loader.checkpoint, f"model.layers.{n}."
    hidden = (loader.config.hidden_size,)
    norm = HeadNorm(
        ck.get(p + "self_attn.q_norm.weight", (loader.config.head_dim,)),
        ck.get(p + "self_attn.k_norm.weight", (loader.config.head_dim,)),
        loader.config.rms_norm_eps,
    )
    return DecoderLayer(
        input_norm=ck.get(p + "input_layernorm.weight", hidden),
        attention=loader.attention(n, norm),
        post_norm=ck.get(p + "post_attention_layernorm.weight", hidden),
        moe=loader.moe(p + "mlp."),
    )
