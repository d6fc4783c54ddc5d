"""What the adapter store knows about the base model: its shapes and its identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import AdapterRefused, BaseModelError
from .safetensors_header import read_header

Cut = Literal["column", "row"]

# Where a family's config has the intermediate size of one expert.
_EXPERT_SIZE_FIELDS = {
    "qwen3_moe": "moe_intermediate_size",
    "olmoe": "intermediate_size",
    "mixtral": "intermediate_size",
    "qwen2_moe": "moe_intermediate_size",
    "gpt_oss": "intermediate_size",
}
SUPPORTED_MODEL_TYPES = tuple(_EXPERT_SIZE_FIELDS)

# The part of config.json that decides what a LoRA factor means. Fields that only tune numerics or
# that other library versions spell differently (rope, dtype) would change the fingerprint of the
# same weights, so they stay out: the weights' own bytes stand for the model's identity.
_FINGERPRINT_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "intermediate_size",
    "decoder_sparse_step",
    "mlp_only_layers",
    "tie_word_embeddings",
)
_SAMPLE_BYTES = 64 * 1024  # hashed from each end of each shard's data


@dataclass(frozen=True)
class DenseTarget:
    """A dense projection that adapters may target. Weight shape [out, in_].

    `cut` says which dimension tensor parallelism divides: "column" cuts out, "row" cuts in_.
    """

    out: int
    in_: int
    cut: Cut


@dataclass(frozen=True)
class BaseModel:
    """Shapes and identity of the model that adapters are served on.

    Attributes:
        name: the name it is served under.
        fingerprint: sha256 hex of config shapes, safetensors headers and samples of the weights.
        hidden: model width H. moe_intermediate: width I of one expert.
        dense_targets: the attention projections, by name as in `self_attn.<name>`, and those of
            a shared expert, as "shared_expert.<name>".
        moe_layers: indices of the layers that hold experts.
        accepted_names: lower-case last path components that an adapter's
            `base_model_name_or_path` may have.
    """

    name: str
    fingerprint: str
    model_type: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    moe_intermediate: int
    dense_targets: Mapping[str, DenseTarget]
    moe_layers: tuple[int, ...]
    accepted_names: tuple[str, ...]

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        served_name: str | None = None,
        accepted_names: Iterable[str] = (),
        dummy_weights: bool = False,
    ) -> BaseModel:
        """Reads a model folder in Hugging Face layout, without loading any weight.

        Args:
            path: folder with config.json and *.safetensors.
            served_name: name to serve under; the folder's own name when None.
            accepted_names: further names by which adapters may call this model.
            dummy_weights: the model is served with random weights: there are no files of them, and
                the fingerprint is that of the config and of nothing else.

        Raises:
            BaseModelError: a file is missing or unreadable, or the architecture isn't supported.
        """
        folder = Path(path)
        config = _read_config(folder)
        name = served_name or folder.resolve().name
        names = (name, folder.resolve().name, config.get("_name_or_path") or "", *accepted_names)
        hidden = _size(config, "hidden_size", folder)
        heads = _size(config, "num_attention_heads", folder)
        config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
        config["head_dim"] = config.get("head_dim") or hidden // heads
        kv_heads = _size(config, "num_key_value_heads", folder)
        head_dim = _size(config, "head_dim", folder)
        layers = _size(config, "num_hidden_layers", folder)
        return cls(
            name=name,
            fingerprint=_fingerprint(folder, config, dummy_weights),
            model_type=config["model_type"],
            num_layers=layers,
            hidden=hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            num_experts=_size(config, "num_experts", folder),
            moe_intermediate=_size(config, _EXPERT_SIZE_FIELDS[config["model_type"]], folder),
            dense_targets=_attention_targets(hidden, heads, kv_heads, head_dim)
            | _shared_expert_targets(config, hidden, folder),
            moe_layers=_moe_layers(config, layers),
            accepted_names=tuple(sorted({last_component(n) for n in names} - {""})),
        )

    @property
    def rewritten_projections(self) -> tuple[str, str, str] | None:
        """Modules of an expert (gate, up, down) that PEFT turns into targets of fused parameters.

        None where it doesn't: in Qwen2-MoE these names remain the shared expert's, and gpt-oss's
        experts have never been modules.
        """
        if self.model_type in ("qwen2_moe", "gpt_oss"):
            return None
        if self.model_type == "mixtral":
            return "w1", "w3", "w2"
        return "gate_proj", "up_proj", "down_proj"

    @property
    def transposed_experts(self) -> bool:
        """Whether the fused parameters are [E, in, out], with gate and up interleaved along out."""
        return self.model_type == "gpt_oss"

    def accepts_name(self, base_model_name_or_path: str | None) -> bool:
        """Whether an adapter made for that name may be served here.

        An empty name or one that looks like a path on somebody's disk says nothing about the
        model; the factors' shapes decide then.
        """
        name = base_model_name_or_path
        if not name or name.startswith(("/", ".")) or "\\" in name:
            return True
        return last_component(name) in self.accepted_names

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> BaseModel:
        fields = json.loads(text)
        targets = {name: DenseTarget(**t) for name, t in fields["dense_targets"].items()}
        return cls(
            **fields
            | {
                "dense_targets": targets,
                "moe_layers": tuple(fields["moe_layers"]),
                "accepted_names": tuple(fields["accepted_names"]),
            }
        )


def last_component(name: str) -> str:
    """Lower-case last component of a hub id or a path."""
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def _attention_targets(
    hidden: int, heads: int, kv_heads: int, head_dim: int
) -> dict[str, DenseTarget]:
    q, kv = heads * head_dim, kv_heads * head_dim
    return {
        "q_proj": DenseTarget(q, hidden, "column"),
        "k_proj": DenseTarget(kv, hidden, "column"),
        "v_proj": DenseTarget(kv, hidden, "column"),
        "o_proj": DenseTarget(hidden, q, "row"),
    }


def _shared_expert_targets(
    config: Mapping[str, Any], hidden: int, folder: Path
) -> dict[str, DenseTarget]:
    if config["model_type"] != "qwen2_moe":
        return {}
    inter = _size(config, "shared_expert_intermediate_size", folder)
    return {
        "shared_expert.gate_proj": DenseTarget(inter, hidden, "column"),
        "shared_expert.up_proj": DenseTarget(inter, hidden, "column"),
        "shared_expert.down_proj": DenseTarget(hidden, inter, "row"),
    }


def _moe_layers(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Qwen3-MoE's rule: every `decoder_sparse_step`-th layer, but for `mlp_only_layers`."""
    step = config.get("decoder_sparse_step", 1)
    dense = set(config.get("mlp_only_layers") or ())
    return tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError(
            f"{file} doesn't exist; a model folder in Hugging Face layout (config.json, "
            "*.safetensors, tokenizer files) is needed"
        ) from None
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{file} can't be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise BaseModelError(f"{file} holds a {type(config).__name__}, a JSON object is needed")
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise BaseModelError(
            f"{file}: model_type {model_type!r} isn't supported; "
            f"supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    # transformers 5 writes the number of experts under another name.
    if "num_local_experts" in config:
        config.setdefault("num_experts", config["num_local_experts"])
    return config


def _size(config: Mapping[str, Any], field: str, folder: Path) -> int:
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BaseModelError(
            f"{folder / 'config.json'}: {field} is {value!r}, a positive integer is needed"
        )
    return value


def _fingerprint(folder: Path, config: Mapping[str, Any], dummy_weights: bool) -> str:
    shards = [] if dummy_weights else sorted(folder.glob("*.safetensors"))
    if not shards and not dummy_weights:
        raise BaseModelError(f"{folder} holds no *.safetensors file; pickled weights aren't read")
    kept = {
        field: config[field] for field in _FINGERPRINT_FIELDS if config.get(field) not in (None, [])
    }
    sha = hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode())
    if dummy_weights:
        sha.update(b"dummy weights")
    for shard in shards:
        try:
            header = read_header(shard)
            size = shard.stat().st_size
            tensors = sorted((t.name, t.dtype, t.shape) for t in header.tensors.values())
            sha.update(json.dumps(tensors, separators=(",", ":")).encode())
            with shard.open("rb") as file:
                file.seek(header.data_start)
                sha.update(file.read(_SAMPLE_BYTES))
                file.seek(max(header.data_start, size - _SAMPLE_BYTES))
                sha.update(file.read(_SAMPLE_BYTES))
        except (OSError, AdapterRefused) as error:
            raise BaseModelError(f"{shard} can't be read: {error}") from error
    return sha.hexdigest()
