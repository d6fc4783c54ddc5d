"""From a PEFT adapter's two files to the canonical form, or to the exact reason why not."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from .base_model import BaseModel
from .canonical import (
    CanonicalAdapter,
    ExpertFactors,
    LoraFactors,
    canonical_adapter,
    canonical_layer,
)
from .errors import AdapterRefused
from .factor_checks import Pair, check_pair, duplicate, not_targeted, wrong_shape
from .fused_experts import check_fused, split
from .peft_config import PeftConfig, parse_config
from .peft_keys import DenseSite, ExpertSite, FusedSite, Side, Site, parse_key
from .quoting import safe_key, show
from .safetensors_header import TensorInfo
from .weights_file import WeightsFile, check_dtype

AdapterFormat = Literal["attention", "per_expert", "fused", "per_expert+fused"]


@dataclass(frozen=True)
class LoadedAdapter:
    """A parsed upload; its arrays are views of the weights file.

    `format` says how the experts were named: not at all, one key per expert, or fused.
    """

    adapter: CanonicalAdapter
    format: AdapterFormat


@dataclass
class _LayerParts:
    dense: dict[str, LoraFactors] = field(default_factory=dict)
    experts: dict[int, dict[str, LoraFactors]] = field(default_factory=dict)


def load_adapter(
    config: bytes, weights_path: str | os.PathLike[str], base: BaseModel
) -> LoadedAdapter:
    """Validates a PEFT LoRA adapter against the base model and brings it into canonical form.

    Everything is decided from the config and the safetensors header; then the values are read
    once, tensor by tensor, to see that they are finite.

    Args:
        config: bytes of adapter_config.json.
        weights_path: adapter_model.safetensors; must not change while the result is in use.

    Raises:
        AdapterRefused: with a code of REFUSAL_CODES and the key at fault.
        OSError: the file can't be read.
    """
    parsed = parse_config(config)
    if not base.accepts_name(parsed.base_name):
        raise AdapterRefused(
            "wrong_base",
            f"the adapter was made for {show(parsed.base_name)}, this is {base.name}; accepted "
            f"names: {', '.join(base.accepted_names)}",
            "base_model_name_or_path",
        )
    weights = WeightsFile(weights_path)
    pairs = _pair(weights, base)
    dense = {s: p for s, p in pairs.items() if isinstance(s, DenseSite)}
    single = {s: p for s, p in pairs.items() if isinstance(s, ExpertSite)}
    fused = {s: p for s, p in pairs.items() if isinstance(s, FusedSite)}

    scales: dict[Site, float] = {}
    for dense_site, pair in dense.items():
        scales[dense_site] = _check_dense(dense_site, pair, parsed, base)
    for single_site, pair in single.items():
        scales[single_site] = _check_expert(single_site, pair, parsed, base)
    checked = check_fused(fused, parsed, base)
    weights.check_finite()

    layers: dict[int, _LayerParts] = {}
    for dense_site, (a, b) in dense.items():
        parts = layers.setdefault(dense_site.layer, _LayerParts())
        factors = LoraFactors(scales[dense_site], weights.array(a), weights.array(b))
        _put(parts.dense, dense_site.target, factors, a)
    for single_site, (a, b) in single.items():
        experts = layers.setdefault(single_site.layer, _LayerParts()).experts
        factors = LoraFactors(scales[single_site], weights.array(a), weights.array(b))
        _put(experts.setdefault(single_site.expert, {}), single_site.projection, factors, a)
    for found, swapped in checked:
        experts = layers.setdefault(found.layer, _LayerParts()).experts
        for e, projections in enumerate(split(found, swapped, weights, base)):
            for projection, factors in projections.items():
                _put(experts.setdefault(e, {}), projection, factors, found.a)

    adapter = canonical_adapter(
        base,
        (
            canonical_layer(
                index, parts.dense, {e: ExpertFactors(**p) for e, p in parts.experts.items()}
            )
            for index, parts in layers.items()
        ),
    )
    return LoadedAdapter(adapter, _format(bool(single), bool(fused)))


def _format(single: bool, fused: bool) -> AdapterFormat:
    if single:
        return "per_expert+fused" if fused else "per_expert"
    return "fused" if fused else "attention"


def _put(parts: dict[str, LoraFactors], name: str, factors: LoraFactors, a: TensorInfo) -> None:
    """Two spellings of one module ("model.layers.0", "layers.0") would meet only here."""
    if name in parts:
        raise duplicate(a, f"another tensor for {name}")
    parts[name] = factors


def _pair(weights: WeightsFile, base: BaseModel) -> dict[Site, Pair]:
    """All tensors as (A, B) by what they adapt."""
    halves: dict[Site, dict[Side, TensorInfo]] = {}
    for info in weights.header.tensors.values():
        site, side = parse_key(info.name, base)
        check_dtype(info)
        if len(info.shape) != 2:
            raise wrong_shape(info, "two dimensions")
        sides = halves.setdefault(site, {})
        if side in sides:
            raise duplicate(info, sides[side].name)
        sides[side] = info
    for sides in halves.values():
        if len(sides) != 2:
            ((side, info),) = sides.items()
            raise AdapterRefused(
                "missing_pair",
                f"tensor {show(info.name)}: its lora_{'B' if side == 'A' else 'A'} is missing",
                safe_key(info.name),
            )
    return {site: (sides["A"], sides["B"]) for site, sides in halves.items()}


def _check_dense(site: DenseSite, pair: Pair, config: PeftConfig, base: BaseModel) -> float:
    """Checks one dense projection; returns its scale."""
    target = base.dense_targets[site.target]
    name = site.module
    if not config.targets_module(name):
        name = f"{site.module}.weight"  # PEFT can wrap the weight itself as well
        if not config.targets_parameter(name):
            raise not_targeted(pair[0], site.module)
    check_pair(pair, config.rank_of(name), target.in_, target.out)
    return config.scale_of(name)


def _check_expert(site: ExpertSite, pair: Pair, config: PeftConfig, base: BaseModel) -> float:
    """Checks one projection of one expert; returns its scale."""
    if not config.targets_module(site.module):
        raise not_targeted(pair[0], site.module)
    H, inter = base.hidden, base.moe_intermediate
    in_, out = (inter, H) if site.projection == "down" else (H, inter)
    check_pair(pair, config.rank_of(site.module), in_, out)
    return config.scale_of(site.module)
