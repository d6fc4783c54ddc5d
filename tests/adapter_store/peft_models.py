"""Adapters written by PEFT itself over tiny random models, and the weight updates that it means."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loraplex.adapter_store import BaseModel, CanonicalAdapter
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.adapters import dense_delta

LAYERS, EXPERTS, HIDDEN, INTER = 2, 4, 32, 24
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# (layer, target) or (layer, expert, projection) -> update [out, in]
Deltas = dict[tuple[Any, ...], np.ndarray]
_SCRATCH = tempfile.TemporaryDirectory(prefix="loraplex-test-")  # removed when Python ends
_PROJECTION = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


@functools.cache
def base_folder() -> Path:
    """A tiny Qwen3-MoE saved by transformers."""
    folder = Path(_SCRATCH.name) / "tiny-moe"
    fused_model().save_pretrained(folder)
    return folder


@functools.cache
def base_model() -> BaseModel:
    return BaseModel.from_folder(base_folder())


def fused_model(**changes: Any) -> Qwen3MoeForCausalLM:
    """The model as transformers 5 builds it: the experts of a layer are fused parameters."""
    fields: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": INTER,
        "intermediate_size": 48,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields | changes))


def unfused_model() -> nn.Module:
    """The same modules as transformers 4 named them: one nn.Linear per expert and projection."""

    def tree(**children: nn.Module) -> nn.Module:
        module = nn.Module()
        for name, child in children.items():
            module.add_module(name, child)
        return module

    def linear(in_: int, out: int) -> nn.Linear:
        return nn.Linear(in_, out, bias=False)

    def expert() -> nn.Module:
        return tree(
            gate_proj=linear(HIDDEN, INTER),
            up_proj=linear(HIDDEN, INTER),
            down_proj=linear(INTER, HIDDEN),
        )

    def layer() -> nn.Module:
        q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        attention = tree(
            q_proj=linear(HIDDEN, q),
            k_proj=linear(HIDDEN, kv),
            v_proj=linear(HIDDEN, kv),
            o_proj=linear(q, HIDDEN),
        )
        experts = nn.ModuleList(expert() for _ in range(EXPERTS))
        return tree(self_attn=attention, mlp=tree(gate=linear(HIDDEN, EXPERTS), experts=experts))

    layers = nn.ModuleList(layer() for _ in range(LAYERS))
    return tree(
        model=tree(embed_tokens=nn.Embedding(64, HIDDEN), layers=layers),
        lm_head=linear(HIDDEN, 64),
    )


def write_adapter(
    folder: Path, model: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, **config: Any
) -> Deltas:
    """Lets PEFT make and save an adapter of random factors; returns what PEFT computes from it."""
    peft_model = get_peft_model(model(), LoraConfig(**{"r": 4, "lora_alpha": 8} | config))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn_like(parameter).mul_(0.2).to(dtype))
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    if dtype != torch.float32:
        cast_weights(folder, dtype)
    return peft_deltas(peft_model)


def cast_weights(folder: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = {k: v.to(dtype) for k, v in load_torch(folder / WEIGHTS).items()}
    save_torch(tensors, folder / WEIGHTS)


def peft_deltas(model: PeftModel) -> Deltas:
    """Every update that PEFT would merge into the base weights."""
    deltas: Deltas = {}
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        parts = name.replace(".base_layer", "").split(".")
        layer = int(parts[2])
        delta = module.get_delta_weight("default").detach().float().numpy()  # type: ignore[operator]
        if isinstance(module, ParamWrapper) and delta.ndim == 3:
            for e in range(EXPERTS):
                if module.parameter_name == "down_proj":
                    deltas[layer, e, "down"] = delta[e]
                else:
                    deltas[layer, e, "gate"], deltas[layer, e, "up"] = np.split(delta[e], 2)
        elif "experts" in parts:
            deltas[layer, int(parts[5]), _PROJECTION[parts[6]]] = delta
        else:
            deltas[layer, parts[4]] = delta
    return deltas


def canonical_deltas(adapter: CanonicalAdapter) -> Deltas:
    """The updates that a parsed adapter stands for."""
    deltas: Deltas = {}
    for layer in adapter.layers:
        for target, factors in layer.dense.items():
            deltas[layer.index, target] = dense_delta(factors)
        for e, expert in layer.experts.items():
            for name, part in zip(("gate", "up", "down"), expert.projections(), strict=True):
                if part is not None:
                    deltas[layer.index, e, name] = dense_delta(part)
    return deltas


def assert_same_deltas(got: Deltas, want: Deltas) -> None:
    assert got.keys() == want.keys()
    assert want
    for site, delta in want.items():
        assert np.abs(delta).max() > 1e-3, site
        np.testing.assert_allclose(got[site], delta, atol=1e-5, rtol=0, err_msg=str(site))


def config_bytes(folder: Path, **changes: Any) -> bytes:
    """The adapter's config, with fields changed."""
    fields = json.loads((folder / CONFIG).read_text())
    return json.dumps(fields | changes).encode()


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    """Saves the adapter's tensors again after `change`."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
