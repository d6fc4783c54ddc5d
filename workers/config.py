"""Configuration of a model and of the engine that runs it. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from .deepseek_config import LatentSizes, RoutingGroups
from .errors import ModelFilesInvalid, ModelUnsupported
from .families import (
    FAMILIES,
    Family,
    layer_windows,
    quant_method,
    rope_parameters,
    rope_type,
    unserved_fp8_format,
    unserved_options,
)
from .layers.rope_parameters import Yarn


@dataclass(frozen=True)
class ModelConfig:
    """The parts of a Hugging Face `config.json` that inference needs."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    layer_windows: tuple[int | None, ...]  # tokens that each layer's attention sees; None: all
    yarn: Yarn | None = None  # None: rope of the default type
    qkv_bias: bool = False
    o_bias: bool = False
    shared_expert_size: int = 0  # intermediate size; 0: there is none
    dense_layers: int = 0  # the first layers, which have an MLP of dense_size and no experts
    dense_size: int = 0
    latent: LatentSizes | None = None  # where attention is by latents; num_kv_heads is 1 then
    routing_groups: RoutingGroups | None = None
    swiglu_clamp: tuple[float, float] | None = None  # gpt-oss's (alpha, limit); None: plain SwiGLU
    quantisation: str | None = None  # of the checkpoint; in memory FP8 experts alone are quantised

    @property
    def rope_dim(self) -> int:
        """Size of the rotated part of a head."""
        return self.head_dim if self.latent is None else self.latent.rope

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Reads config.json and generation_config.json.

        Raises:
            ModelFilesInvalid: config.json is missing or not JSON.
            ModelUnsupported: an architecture or option that would change the result is not served.
        """
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise ModelFilesInvalid(
                f"{path} does not exist; give a folder that holds a Hugging Face checkpoint "
                "(config.json and *.safetensors)"
            ) from None
        except json.JSONDecodeError as e:
            raise ModelFilesInvalid(f"{path} is not valid JSON: {e}") from None
        family = FAMILIES.get(raw.get("model_type"))
        if family is None:
            raise ModelUnsupported(
                f"{path}: model_type {raw.get('model_type')!r} isn't served; "
                f"served: {', '.join(FAMILIES)}"
            )
        _check_served(path, raw, family)
        try:
            windows = layer_windows(raw, family)
        except ValueError as e:
            raise ModelFilesInvalid(f"{path}: {e}") from None
        rope = rope_parameters(raw, family)
        heads, positions = raw["num_attention_heads"], raw["max_position_embeddings"]
        yarn = Yarn.from_parameters(rope, positions) if rope_type(rope) == "yarn" else None
        latent = LatentSizes.from_config(raw, rope, yarn) if family.latent else None
        attention_bias = family.attention_bias and raw.get("attention_bias", True)
        dense_layers = (raw.get("first_k_dense_replace") or 0) if family.latent else 0
        return cls(
            model_type=raw["model_type"],
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=1 if latent else raw.get("num_key_value_heads") or heads,
            head_dim=(
                latent.head if latent else raw.get("head_dim") or raw["hidden_size"] // heads
            ),
            num_experts=_num_experts(raw),
            top_k=raw["num_experts_per_tok"],
            moe_intermediate_size=raw[family.expert_size_field],
            norm_topk_prob=raw.get("norm_topk_prob", family.norm_topk_prob),
            rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or family.rope_theta),
            max_position_embeddings=positions,
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            eos_token_ids=_eos_ids(Path(folder), raw),
            layer_windows=windows,
            yarn=yarn,
            qkv_bias=attention_bias or raw.get("qkv_bias", family.qkv_bias),
            o_bias=attention_bias,
            shared_expert_size=_shared_size(raw, family),
            dense_layers=dense_layers,
            dense_size=raw["intermediate_size"] if dense_layers else 0,
            latent=latent,
            routing_groups=RoutingGroups.from_config(raw) if family.latent else None,
            swiglu_clamp=_swiglu_clamp(raw, family),
            quantisation=quant_method(raw),
        )


def _check_served(path: Path, raw: dict[str, Any], family: Family) -> None:
    quantisation = quant_method(raw)
    if quantisation is not None and quantisation not in family.quantisations:
        readable = " or ".join(["in bfloat16", *sorted(family.quantisations)])
        raise ModelUnsupported(
            f"{path}: weights quantised by {quantisation!r} (quantization_config) aren't served; "
            f"give the checkpoint {readable}"
        )
    if quantisation == "fp8" and (format_ := unserved_fp8_format(raw)):
        raise ModelUnsupported(f"{path}: quantization_config has {format_}")
    for name, value in unserved_options(raw, family).items():
        raise ModelUnsupported(f"{path}: {name} = {value!r} isn't served")


def _num_experts(config: dict[str, Any]) -> int:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next(config[name] for name in names if config.get(name))


def _shared_size(config: dict[str, Any], family: Family) -> int:
    """Intermediate size of the shared experts, which are one MLP where there are several."""
    if family.latent:
        return (config.get("n_shared_experts") or 0) * config["moe_intermediate_size"]
    return config["shared_expert_intermediate_size"] if family.shared_expert else 0


def _swiglu_clamp(config: dict[str, Any], family: Family) -> tuple[float, float] | None:
    if not family.clamped_swiglu:
        return None
    return config.get("swiglu_alpha", 1.702), config.get("swiglu_limit", 7.0)


def _eos_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    # generation_config.json wins: chat models list their end-of-turn token there only.
    path = folder / "generation_config.json"
    eos = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    if eos is None:
        eos = config.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)


@dataclass(frozen=True)
class EngineConfig:
    """One engine: a model, its memory and its batch limits. The same object goes to every rank.

    Sizes are bytes unless the name says otherwise; `pool_bytes` is per rank.
    """

    model_path: str
    dtype: str = "float32"  # "float32" | "bfloat16" | "float16"
    load_format: Literal["auto", "dummy"] = "auto"  # dummy: random weights, no files needed
    device: str = "cpu"  # "cpu" | "cuda"
    tp_size: int = 1  # ranks
    ep_size: int = 1  # groups of ranks that the experts are split over; divides tp_size
    rendezvous: str = "tcp://127.0.0.1:29500"  # used when tp_size > 1
    kv_tokens: int | None = 16384  # None: derived, on a GPU (see memory_fraction)
    block_size: int = 16
    max_batch_tokens: int = 512
    max_running: int = 64
    max_model_len: int | None = None  # None: what the model was made for
    pool_bytes: int | None = 64 << 20  # None: derived, on a GPU
    # Of a GPU's memory, what weights, activations, KV cache and pool take together where a size is
    # derived; CUDA graphs come out of the rest.
    memory_fraction: float = 0.9
    adapter_fraction: float = 0.3  # the pool's share of what weights and activations leave
    max_slots: int = 256
    max_lora_rank: int = 64  # on a GPU, whose kernels set aside room for it; 256 at most
    # Of the node's memory for packs (`adapter_store.HostTier`), which a GPU's ranks pin at start.
    host_folder: str | None = None
    base_fingerprint: str | None = None  # packs made for another base are refused
    load_threads: int = 16
    # While a request waits for room in the pool, others start until work of this price was done
    # (`fairness.Prices`): some 64 steps of 64 decoding sequences. As much is the credit of a tenant
    # that used less than its share before.
    overtake_slack: float = 8192.0
    # Most that the distinct adapters of the running sequences take; None: what the pool holds.
    step_adapter_bytes: int | None = None
    torch_threads: int = 0  # 0: leave torch's default
    # Launch a step before the tokens of the one before it are read. None: on GPUs.
    overlap: bool | None = None
    cuda_graphs: bool = True  # of decode steps, on GPUs

    @cached_property
    def model(self) -> ModelConfig:
        return ModelConfig.from_folder(self.model_path)

    @property
    def overlaps(self) -> bool:
        return self.device == "cuda" if self.overlap is None else self.overlap

    @cached_property
    def context_length(self) -> int:
        """Most tokens (prompt and output) of one sequence."""
        longest = self.model.max_position_embeddings
        # A part of a block holds nothing.
        kv_tokens = (
            self.kv_tokens // self.block_size * self.block_size if self.kv_tokens else longest
        )
        return min(self.max_model_len or longest, longest, kv_tokens)
