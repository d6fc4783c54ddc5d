"""Mixtral: nothing is done to q and k, and the experts go by other names."""

from __future__ import annotations

from .decoder import DecoderLayer
from .loading import Loader


def load_layer(loader: Loader, n: int) -> DecoderLayer:
    ck, p = loader.checkpoint, f"model.layers.{n}."
    hidden = (loader.config.hidden_size,)
    # Published checkpoints say block_sparse_moe; those with fused experts may say mlp.
    moe = next((m for m in ("block_sparse_moe.", "mlp.") if f"{p}{m}gate.weight" in ck), "mlp.")
    return DecoderLayer(
        input_norm=ck.get(p + "input_layernorm.weight", hidden),
        attention=loader.attention(n, norm=None),
        post_norm=ck.get(p + "post_attention_layernorm.weight", hidden),
        moe=loader.moe(p + moe, projections=("w1", "w3", "w2")),
    )
