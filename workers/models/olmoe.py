"""OLMoE: q and k are normalised over all heads together."""

from __future__ import annotations

from ..layers.blocks import WholeNorm
from .decoder import DecoderLayer
from .loading import Loader


def load_layer(loader: Loader, n: int) -> DecoderLayer:
    ck, p = loader.checkpoint, f"model.layers.{n}."
    hidden = (loader.config.hidden_size,)
    m, shard = loader.config, loader.shard
    q_rows, k_rows = (slice(*shard.rows(name)) for name in ("q_proj", "k_proj"))
    norm = WholeNorm(
        loader.comm,
        ck.get(p + "self_attn.q_norm.weight", (m.num_heads * m.head_dim,), q_rows),
        ck.get(p + "self_attn.k_norm.weight", (m.num_kv_heads * m.head_dim,), k_rows),
        m.rms_norm_eps,
    )
    return DecoderLayer(
        input_norm=ck.get(p + "input_layernorm.weight", hidden),
        attention=loader.attention(n, norm),
        post_norm=ck.get(p + "post_attention_layernorm.weight", hidden),
        moe=loader.moe(p + "mlp."),
    )
