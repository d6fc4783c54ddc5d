"""A random model with the sizes of a small real one, and adapters of all layouts for it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from loraplex.adapter_store import BaseModel, Pack, write_pack
from loraplex.workers import AdapterRef, EngineConfig
from safetensors.torch import save_file

from ..adapters import random_canonical
from ..workers.conftest import TENANT, LocalPacks

VOCAB, LAYERS, HIDDEN, INTER, EXPERTS, TOP_K = 1024, 4, 512, 256, 32, 4
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"rank": 16, "experts": ()},
    "all experts": {"rank": 8},
    "fused": {"rank": 16, "fused_gate_up": True, "dense": {}},
    "shared-outer": {"rank": 32, "shared_a13": True, "shared_b2": True},
    "odd": {
        "dense": {"q_proj": 3, "o_proj": 13},
        "experts": {0: (3, 5, 1), 7: (8, 9, 7), 20: (0, 2, 0), 31: (17, 0, 12)},
    },
}


@dataclass
class MidModel:
    folder: Path
    base: BaseModel
    packs: LocalPacks = field(default_factory=LocalPacks)
    refs: dict[str, AdapterRef] = field(default_factory=dict)

    def config(self, **changes: Any) -> EngineConfig:
        fields = {"model_path": str(self.folder), "base_fingerprint": self.base.fingerprint}
        return EngineConfig(**{**fields, "pool_bytes": 256 << 20, "kv_tokens": 8192, **changes})


def make_mid_model(folder: Path) -> MidModel:
    """Weights and factors are in bfloat16, so engines of any type compute with the same ones."""
    model = folder / "model"
    model.mkdir()
    config = {
        "model_type": "qwen3_moe",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": INTER,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    }
    (model / "config.json").write_text(json.dumps(config))
    save_file(_weights(), model / "model.safetensors")
    mid = MidModel(model, BaseModel.from_folder(model, "mid"))
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        path = folder / f"{name}.pack"
        write_pack(path, random_canonical(mid.base, seed, dtype="BF16", std=0.05, **options))
        mid.refs[name] = AdapterRef(TENANT, Pack.open(path).digest)
        mid.packs.paths[mid.refs[name].key] = path
    return mid


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)

    def draw(out: int, in_: int) -> torch.Tensor:
        return (torch.randn(out, in_, generator=generator) / in_**0.5).bfloat16()

    def norm(size: int) -> torch.Tensor:
        return (1 + 0.1 * torch.randn(size, generator=generator)).bfloat16()

    weights = {
        # Of the size of what a layer adds: else rounding is all that deep layers see.
        "model.embed_tokens.weight": draw(VOCAB, HIDDEN) * HIDDEN**0.5,
        "model.norm.weight": norm(HIDDEN),
        "lm_head.weight": 3 * draw(VOCAB, HIDDEN),  # some tokens are likely, as after training
    }
    for n in range(LAYERS):
        layer, attention = f"model.layers.{n}", f"model.layers.{n}.self_attn"
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{name}.weight"] = norm(HIDDEN)
        for name in ("q_norm", "k_norm"):
            weights[f"{attention}.{name}.weight"] = norm(HEAD_DIM)
        weights[f"{attention}.q_proj.weight"] = draw(HEADS * HEAD_DIM, HIDDEN)
        weights[f"{attention}.k_proj.weight"] = draw(KV_HEADS * HEAD_DIM, HIDDEN)
        weights[f"{attention}.v_proj.weight"] = draw(KV_HEADS * HEAD_DIM, HIDDEN)
        weights[f"{attention}.o_proj.weight"] = draw(HIDDEN, HEADS * HEAD_DIM)
        weights[f"{layer}.mlp.gate.weight"] = draw(EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            expert = f"{layer}.mlp.experts.{e}"
            weights[f"{expert}.gate_proj.weight"] = draw(INTER, HIDDEN)
            weights[f"{expert}.up_proj.weight"] = draw(INTER, HIDDEN)
            weights[f"{expert}.down_proj.weight"] = draw(HIDDEN, INTER)
    return weights
