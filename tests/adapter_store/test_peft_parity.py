"""A parsed adapter stands for exactly the weight updates that PEFT computes from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loraplex.adapter_store import LoadedAdapter, Pack, load_adapter, make_pack
from peft import PeftModel

from .peft_models import (
    CONFIG,
    INTER,
    WEIGHTS,
    assert_same_deltas,
    base_model,
    canonical_deltas,
    config_bytes,
    fused_model,
    peft_deltas,
    rewrite,
    unfused_model,
    write_adapter,
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]

FUSED_CASES: dict[str, dict[str, Any]] = {
    "attention only": {"target_modules": ATTENTION},
    "both parameters": {
        "target_modules": ATTENTION,
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "gate_up alone": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "down alone": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    "one layer's parameter": {
        "target_modules": ["q_proj"],
        "target_parameters": ["layers.1.mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "modules rewritten to parameters": {"target_modules": ["v_proj", *PROJECTIONS]},
    "modules rewritten, rsLoRA": {"target_modules": PROJECTIONS, "use_rslora": True},
    "all-linear without the router": {
        "target_modules": r".*(self_attn\.[qkvo]_proj|experts\.(gate|up|down)_proj)"
    },
    "rsLoRA with patterns": {
        "target_modules": ATTENTION,
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "use_rslora": True,
        "rank_pattern": {
            # PEFT saves its config with sorted keys, and the first pattern that fits wins: only
            # overlapping patterns in sorted order survive their own file.
            r".*layers\.0\..*gate_up_proj": 3,
            "gate_up_proj": 5,
            "model.layers.1.self_attn.o_proj": 7,
            "q_proj": 2,
        },
        "alpha_pattern": {r"^model\.layers\.1\..*": 5, "down_proj": 3},
    },
    "layers_to_transform": {"target_modules": ATTENTION, "layers_to_transform": [1]},
    "a projection's weight as parameter": {
        "target_modules": ["k_proj"],
        "target_parameters": ["q_proj.weight"],
        "rank_pattern": {"q_proj.weight": 3, "q_proj": 6},
    },
}

UNFUSED_CASES: dict[str, dict[str, Any]] = {
    "all projections": {"target_modules": ATTENTION + PROJECTIONS},
    "gate and down only": {"target_modules": ["gate_proj", "down_proj"]},
    "some experts": {
        "target_modules": r".*layers\.0\.mlp\.experts\.[13]\.(gate|up|down)_proj|.*q_proj"
    },
    "patterns per expert": {
        "target_modules": ["q_proj", *PROJECTIONS],
        "rank_pattern": {"experts.1.gate_proj": 2, r"experts\.[23]\..*": 6, "up_proj": 3},
        "alpha_pattern": {r"layers.1.mlp.experts.\d.down_proj": 1, "experts.0.up_proj": 32},
    },
    "patterns with rsLoRA": {
        "target_modules": PROJECTIONS,
        "use_rslora": True,
        "rank_pattern": {"(gate|up)_proj": 9},
        "alpha_pattern": {"down_proj": 2.5},
    },
    "excluded modules": {
        "target_modules": PROJECTIONS,
        "exclude_modules": r".*experts\.0\..*",
    },
    "excluded names": {
        "target_modules": ATTENTION,
        "exclude_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
    },
    "layers by pattern": {
        "target_modules": PROJECTIONS,
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "layers_to_transform": {"target_modules": PROJECTIONS, "layers_to_transform": [0]},
}


def load(folder: Path) -> LoadedAdapter:
    return load_adapter(config_bytes(folder), folder / WEIGHTS, base_model())


@pytest.mark.parametrize("case", FUSED_CASES)
def test_adapters_of_fused_models(case: str, tmp_path: Path) -> None:
    want = write_adapter(tmp_path, fused_model, **FUSED_CASES[case])
    assert_same_deltas(canonical_deltas(load(tmp_path).adapter), want)


@pytest.mark.parametrize("case", UNFUSED_CASES)
def test_adapters_with_keys_per_expert(case: str, tmp_path: Path) -> None:
    want = write_adapter(tmp_path, unfused_model, **UNFUSED_CASES[case])
    assert_same_deltas(canonical_deltas(load(tmp_path).adapter), want)


def test_per_expert_keys_mean_what_peft_makes_of_them_on_a_fused_model(tmp_path: Path) -> None:
    write_adapter(tmp_path, unfused_model, target_modules=["q_proj", *PROJECTIONS])
    loaded = PeftModel.from_pretrained(fused_model(), str(tmp_path))
    assert_same_deltas(canonical_deltas(load(tmp_path).adapter), peft_deltas(loaded))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")],
)
def test_source_dtype_is_kept(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    want = write_adapter(tmp_path, unfused_model, dtype, target_modules=PROJECTIONS + ATTENTION)
    loaded = load(tmp_path)
    assert loaded.adapter.dtype == name
    assert_same_deltas(canonical_deltas(loaded.adapter), want)


def test_mixed_dtypes_become_float32(tmp_path: Path) -> None:
    want = write_adapter(tmp_path, unfused_model, torch.float16, target_modules=ATTENTION)
    rewrite(
        tmp_path,
        lambda ts: {k: v.astype(np.float32) if "q_proj" in k else v for k, v in ts.items()},
    )
    info = make_pack(
        config_bytes(tmp_path), tmp_path / WEIGHTS, base_model(), tmp_path / "mixed.pack"
    )
    assert info.dtype == "F32"
    pack = Pack.open(tmp_path / "mixed.pack")
    scale = pack.layers[0].dense["v_proj"].scale
    got = scale * pack.dense_b(0, "v_proj") @ pack.dense_a(0, "v_proj")
    np.testing.assert_allclose(got, want[0, "v_proj"], atol=1e-5)


def test_swapped_factors_of_peft_0_18_are_recognised_by_their_shapes(tmp_path: Path) -> None:
    want = write_adapter(
        tmp_path,
        fused_model,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )

    def swap(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The same update in 0.18's layout: A [E*r, out] from B, B [in, r*E] from A."""
        swapped = {}
        for key in [k for k in tensors if "lora_A" in k]:
            other = key.replace("lora_A", "lora_B")
            a, b = tensors[key], tensors[other]
            rank = a.shape[0] // 4
            a_eri, b_ore = a.reshape(4, rank, -1), b.reshape(-1, rank, 4)
            swapped[key] = np.ascontiguousarray(b_ore.transpose(2, 1, 0)).reshape(4 * rank, -1)
            swapped[other] = np.ascontiguousarray(a_eri.transpose(2, 1, 0)).reshape(-1, 4 * rank)
        return swapped

    rewrite(tmp_path, swap)
    got = load_adapter(
        config_bytes(tmp_path, peft_version="0.18.1"), tmp_path / WEIGHTS, base_model()
    )
    assert_same_deltas(canonical_deltas(got.adapter), want)


def test_fresh_adapters_with_zero_b_are_valid(tmp_path: Path) -> None:
    write_adapter(tmp_path, unfused_model, target_modules=PROJECTIONS)
    rewrite(tmp_path, lambda ts: {k: v * ("lora_A" in k) for k, v in ts.items()})
    deltas = canonical_deltas(load(tmp_path).adapter)
    assert len(deltas) == 2 * 4 * 3
    assert not any(delta.any() for delta in deltas.values())


@pytest.mark.parametrize(
    ("case", "config", "model", "expected"),
    [
        ("attention", {"target_modules": ATTENTION}, unfused_model, "attention"),
        ("unfused", {"target_modules": PROJECTIONS}, unfused_model, "per_expert"),
        ("fused", {"target_modules": PROJECTIONS}, fused_model, "fused"),
    ],
)
def test_format_is_reported(
    case: str, config: dict[str, Any], model: Any, expected: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path, model, **config)
    assert load(tmp_path).format == expected


def test_make_pack_reports_what_the_catalogue_records(tmp_path: Path) -> None:
    write_adapter(
        tmp_path,
        fused_model,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj"],
        rank_pattern={"gate_up_proj": 6},
    )
    config = (tmp_path / CONFIG).read_bytes()
    info = make_pack(config, tmp_path / WEIGHTS, base_model(), tmp_path / "pack.bin")
    pack = Pack.open(tmp_path / "pack.bin")
    assert (info.rank_max, info.format) == (6, "fused")
    assert info.targets == ("experts.gate", "experts.up", "q_proj")
    assert (info.digest, info.nbytes) == (pack.digest, (tmp_path / "pack.bin").stat().st_size)
    again = make_pack(config, tmp_path / WEIGHTS, base_model(), tmp_path / "again.bin")
    assert again == info
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "pack.bin").read_bytes()
    experts = pack.layers[0].experts
    assert experts is not None
    assert experts.fused_gate_up
    assert pack.b13(0, 1, "up").shape == (INTER, 6)
