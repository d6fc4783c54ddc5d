"""One digest per adapter: whatever the keys are called, and only for exactly these factors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from loraplex.adapter_store import (
    BaseModel,
    CanonicalAdapter,
    ExpertFactors,
    adapter_digest,
    canonical_adapter,
    canonical_layer,
    load_adapter,
)
from safetensors.numpy import save_file

from tests.adapters import random_canonical, tiny_base_model

from .peft_models import (
    WEIGHTS,
    base_model,
    config_bytes,
    fused_model,
    rewrite,
    unfused_model,
    write_adapter,
)

PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]


def digest_of(folder: Path, base: BaseModel | None = None, **config: object) -> str:
    loaded = load_adapter(config_bytes(folder, **config), folder / WEIGHTS, base or base_model())
    return adapter_digest(loaded.adapter)


def write_per_expert(folder: Path, adapter: CanonicalAdapter, rank: int, alpha: float) -> None:
    """Writes a canonical adapter of one rank and scale with a key per expert and projection."""
    tensors = {}
    for layer in adapter.layers:
        stem = f"base_model.model.model.layers.{layer.index}"
        sites = {f"{stem}.self_attn.{name}": f for name, f in layer.dense.items()}
        for e, expert in layer.experts.items():
            for name, part in zip(PROJECTIONS, expert.projections(), strict=True):
                if part is not None:
                    sites[f"{stem}.mlp.experts.{e}.{name}"] = part
        for site, factors in sites.items():
            assert factors.rank == rank
            tensors[f"{site}.lora_A.weight"] = np.ascontiguousarray(factors.a)
            tensors[f"{site}.lora_B.weight"] = np.ascontiguousarray(factors.b)
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
    config["target_modules"] = ["q_proj", *PROJECTIONS]  # type: ignore[assignment]
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_fused_and_per_expert_forms_of_one_adapter_have_one_digest(tmp_path: Path) -> None:
    fused, single = tmp_path / "fused", tmp_path / "single"
    single.mkdir()
    write_adapter(
        fused,
        fused_model,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    adapter = load_adapter(config_bytes(fused), fused / WEIGHTS, base_model()).adapter
    write_per_expert(single, adapter, rank=4, alpha=8)
    assert digest_of(single) == digest_of(fused)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.", ""),
        (".weight", ".default.weight"),
        (".mlp.experts.", ".block_sparse_moe.experts."),
    ],
)
def test_key_naming_doesnt_count(old: str, new: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, unfused_model, target_modules=["q_proj", *PROJECTIONS])
    before = digest_of(tmp_path)
    rewrite(tmp_path, lambda ts: {k.replace(old, new): v for k, v in reversed(ts.items())})
    assert digest_of(tmp_path) == before


def test_mixtral_names_of_projections_dont_count(tmp_path: Path) -> None:
    write_adapter(tmp_path, unfused_model, target_modules=PROJECTIONS)
    before = digest_of(tmp_path)
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

    def rename(key: str) -> str:
        for old, new in names.items():
            key = key.replace(old, new)
        return key

    rewrite(tmp_path, lambda ts: {rename(k): v for k, v in ts.items()})
    assert digest_of(tmp_path, target_modules=["w1", "w2", "w3"]) == before


def test_config_that_computes_the_same_doesnt_count(tmp_path: Path) -> None:
    write_adapter(tmp_path, unfused_model, target_modules=PROJECTIONS)
    before = digest_of(tmp_path)
    assert digest_of(tmp_path, lora_dropout=0.3, task_type="CAUSAL_LM") == before
    assert digest_of(tmp_path, target_modules=r".*_proj", alpha_pattern={"nothing": 3}) == before
    assert digest_of(tmp_path, lora_alpha=4, use_rslora=True) == before  # 4/sqrt(4) == 8/4


def test_every_value_counts(tmp_path: Path) -> None:
    write_adapter(tmp_path, unfused_model, target_modules=["q_proj", *PROJECTIONS])
    seen = {digest_of(tmp_path)}
    rng = np.random.default_rng()
    keys = list(rng.permutation(sorted(_keys(tmp_path)))[:6])
    for key in keys:
        rewrite(tmp_path, lambda ts, key=key: ts | {key: _bump(ts[key], rng)})
        seen.add(digest_of(tmp_path))
    assert len(seen) == len(keys) + 1


@pytest.mark.parametrize(
    "change", [{"lora_alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"experts.2.up_proj": 1}}]
)
def test_every_scale_counts(change: dict[str, object], tmp_path: Path) -> None:
    write_adapter(tmp_path, unfused_model, target_modules=PROJECTIONS)
    assert digest_of(tmp_path, **change) != digest_of(tmp_path)


def test_base_model_and_dtype_count(tmp_path: Path) -> None:
    write_adapter(tmp_path, unfused_model, target_modules=PROJECTIONS)
    before = digest_of(tmp_path)
    assert digest_of(tmp_path, dataclasses.replace(base_model(), fingerprint="0" * 64)) != before
    rewrite(tmp_path, lambda ts: {k: v.astype(np.float16) for k, v in ts.items()})
    half = digest_of(tmp_path)
    rewrite(tmp_path, lambda ts: {k: v.astype(np.float32) for k, v in ts.items()})
    assert digest_of(tmp_path) not in (half, before)


def test_moving_an_update_elsewhere_counts() -> None:
    adapter = random_canonical(tiny_base_model(), seed=3, experts=[1], dense={}, layers=[0])
    (layer,) = adapter.layers
    expert = layer.experts[1]

    def digest(index: int, experts: dict[int, ExpertFactors]) -> str:
        return adapter_digest(
            canonical_adapter(adapter.base, [canonical_layer(index, {}, experts)])
        )

    crossed = ExpertFactors(expert.up, expert.gate, expert.down)
    digests = [
        digest(0, {1: expert}),
        digest(1, {1: expert}),
        digest(0, {2: expert}),
        digest(0, {1: crossed}),
        digest(0, {1: expert, 2: expert}),
    ]
    assert len(set(digests)) == len(digests)
    assert digests[0] == adapter_digest(adapter)


def _keys(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "np") as file:
        return list(file.keys())


def _bump(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    changed = array.copy()
    at = tuple(int(rng.integers(size)) for size in array.shape)
    changed[at] = np.nextafter(changed[at], np.float32(np.inf))
    return changed
