"""Configuration of a model and of the engine that runs it. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from .errors import ModelFilesInvalid, ModelUnsupported
from .families import (
    FAMILIES,
    layer_windows,
    quant_method,
    rope_parameters,
    rope_type,
    unserved_options,
)
from .rope_parameters import Yarn


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
    swiglu_clamp: tuple[float, float] | None = None  # gpt-oss's (alpha, limit); None: plain SwiGLU
    quantisation: str | None = None  # of the checkpoint; in memory nothing is quantised

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
        for name, value in unserved_options(raw, family).items():
            raise ModelUnsupported(f"{path}: {name} = {value!r} isn't served")
        try:
            windows = layer_windows(raw, family)
        except ValueError as e:
            raise ModelFilesInvalid(f"{path}: {e}") from None
        rope = rope_parameters(raw, family)
        max_positions = raw["max_position_embeddings"]
        attention_bias = family.attention_bias and raw.get("attention_bias", True)
        heads = raw["num_attention_heads"]
        return cls(
            model_type=raw["model_type"],
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            num_experts=raw.get("num_experts") or raw["num_local_experts"],
            top_k=raw["num_experts_per_tok"],
            moe_intermediate_size=raw[family.expert_size_field],
            norm_topk_prob=raw.get("norm_topk_prob", family.norm_topk_prob),
            rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or family.rope_theta),
            max_position_embeddings=max_positions,
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            eos_token_ids=_eos_ids(Path(folder), raw),
            layer_windows=windows,
            yarn=Yarn.from_parameters(rope, max_positions) if rope_type(rope) == "yarn" else None,
            qkv_bias=attention_bias or raw.get("qkv_bias", family.qkv_bias),
            o_bias=attention_bias,
            shared_expert_size=(
                raw["shared_expert_intermediate_size"] if family.shared_expert else 0
            ),
            swiglu_clamp=(
                (raw.get("swiglu_alpha", 1.702), raw.get("swiglu_limit", 7.0))
                if family.clamped_swiglu
                else None
            ),
            quantisation=quant_method(raw),
        )


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
    base_fingerprint: str | None = None  # packs made for another base are refused
    load_threads: int = 4
    overtake_limit: int = 8  # requests that may pass one that waits for room in the pool
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
        return min(self.max_model_len or longest, longest, self.kv_tokens or longest)
