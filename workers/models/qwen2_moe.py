"""Qwen2-MoE: biases on q, k and v, and a shared expert beside the routed ones."""

from __future__ import annotations

from .decoder import DecoderLayer
from .loading import Loader


def load_layer(loader: Loader, n: int) -> DecoderLayer:
    ck, p = loader.checkpoint, f"model.layers.{n}."
    hidden = (loader.config.hidden_size,)
    return DecoderLayer(
        input_norm=ck.get(p + "input_layernorm.weight", hidden),
        attention=loader.attention(n, norm=None),
        post_norm=ck.get(p + "post_attention_layernorm.weight", hidden),
        moe=loader.moe(p + "mlp.", shared=loader.shared_expert(p + "mlp.")),
    )
