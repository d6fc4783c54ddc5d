"""adapter_config.json: what PEFT would make of it, and what isn't served.

Written against PEFT 0.21.2 (`LoraConfig`, `check_target_module_exists`, `get_pattern_key`,
`_convert_peft_config_moe`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from .config_fields import (
    bad_field,
    load_fields,
    read_alpha,
    read_excluded,
    read_flag,
    read_layers,
    read_layers_pattern,
    read_mapping,
    read_parameters,
    read_rank,
    read_table,
    read_targets,
    read_text,
    refuse_unserved,
)
from .errors import AdapterRefused
from .patterns import Pattern, PatternTable
from .quoting import show

# The fused parameters that hold the experts' gate, up and down projections.
_FUSED_PARAMETERS = ("gate_up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class PeftConfig:
    """The part of an adapter_config.json that decides what its tensors mean.

    `target_modules` is a set of names, a Pattern, or "all-linear".
    """

    base_name: str | None
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: frozenset[str] | Pattern | str
    exclude_modules: frozenset[str] | Pattern
    target_parameters: frozenset[str]
    layers_to_transform: frozenset[int] | None
    layers_pattern: tuple[Pattern, ...]
    before_0_19: bool | None  # the PEFT that wrote it; None: version not given
    _ranks: PatternTable
    _alphas: PatternTable

    def targets_module(self, name: str) -> bool:
        """Whether PEFT would adapt the module of that name."""
        if isinstance(self.exclude_modules, Pattern):
            if self.exclude_modules.fullmatch(name):
                return False
        elif _ends_in(name, self.exclude_modules):
            return False
        targets = self.target_modules
        if isinstance(targets, Pattern):
            return targets.fullmatch(name)
        if isinstance(targets, str):
            return True  # all-linear: every projection that is served is a linear layer
        if name in targets:  # a full name is adapted whatever layers_to_transform says
            return True
        return _ends_in(name, targets) and self._in_layers(name)

    def targets_parameter(self, name: str) -> bool:
        """Whether PEFT would adapt the parameter of that name by target_parameters."""
        return _ends_in(name, self.target_parameters)

    def rank_of(self, name: str) -> int:
        return int(self._ranks.get(name, self.rank))

    def scale_of(self, name: str) -> float:
        """The float32 factor on B @ A of the module or parameter of that name."""
        rank = self.rank_of(name)
        alpha = self._alphas.get(name, self.alpha)
        return float(np.float32(alpha / (math.sqrt(rank) if self.use_rslora else rank)))

    def for_fused_experts(
        self, experts: Iterable[str], projections: tuple[str, str, str]
    ) -> PeftConfig:
        """This config as PEFT rewrites it for a model whose experts are fused parameters.

        Targets that name an expert's projection become parameters; gate and up in one double the
        rank and alpha of gate_up_proj.

        Args:
            experts: names of the modules that hold experts, "model.layers.0.mlp.experts", ...
            projections: the names of gate, up and down where they are modules.
        """
        held_by = dict(zip(projections, _FUSED_PARAMETERS, strict=True))
        targets = self.target_modules
        if isinstance(targets, frozenset):
            named = {p for t in targets for p in held_by if t == p or t.endswith(f".{p}")}
        elif isinstance(targets, str):
            named = set(held_by)
        else:
            containers = list(experts)
            named = {p for p in held_by if any(self.targets_module(f"{c}.{p}") for c in containers)}
        if not named:
            return self
        parameters = {held_by[p] for p in named}
        ranks, alphas = dict(self.rank_pattern), dict(self.alpha_pattern)
        if set(projections[:2]) <= named:
            ranks[r".*\.gate_up_proj"] = 2 * self.rank
            alphas[r".*\.gate_up_proj"] = 2 * self.alpha
        return replace(
            self,
            target_parameters=self.target_parameters | parameters,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            _ranks=PatternTable(ranks),
            _alphas=PatternTable(alphas),
        )

    def _in_layers(self, name: str) -> bool:
        if not self.layers_to_transform:
            return True
        numbers = [(name[: m.start()], int(m[1])) for m in re.finditer(r"\.([0-9]+)(?=\.)", name)]
        if self.layers_pattern:
            found = [n for p in self.layers_pattern for before, n in numbers if p.fullmatch(before)]
        else:  # PEFT wants two segments at least before the number
            found = [n for before, n in numbers if "." in before]
        return bool(found) and found[0] in self.layers_to_transform


def parse_config(raw: bytes) -> PeftConfig:
    """Reads an adapter_config.json.

    Raises:
        AdapterRefused: it can't be read ("bad_config"), or asks for what isn't served
            ("unsupported_peft_type", "unsupported_feature", "rank_limit"); `key` is the field.
    """
    fields = load_fields(raw)
    if fields.get("peft_type") != "LORA":
        raise AdapterRefused(
            "unsupported_peft_type",
            f"peft_type is {show(fields.get('peft_type'))}, only 'LORA' is served",
            "peft_type",
        )
    refuse_unserved(fields)
    ranks = {
        p: read_rank(r, "rank_pattern") for p, r in read_mapping(fields, "rank_pattern").items()
    }
    alphas = {
        p: read_alpha(a, "alpha_pattern") for p, a in read_mapping(fields, "alpha_pattern").items()
    }
    modules, parameters = fields.get("target_modules"), fields.get("target_parameters")
    if modules is None and parameters is None:
        raise bad_field("target_modules", "neither target_modules nor target_parameters is given")
    layers = read_layers(fields)
    layers_pattern = read_layers_pattern(fields)
    if isinstance(modules, str) and (layers is not None or layers_pattern):
        raise bad_field("layers_to_transform", "it can't be used when target_modules is a string")
    if layers_pattern and layers is None:
        raise bad_field("layers_pattern", "it can't be used without layers_to_transform")
    return PeftConfig(
        base_name=read_text(fields, "base_model_name_or_path"),
        rank=read_rank(fields.get("r", 8), "r"),
        alpha=read_alpha(fields.get("lora_alpha", 8), "lora_alpha"),
        use_rslora=read_flag(fields, "use_rslora"),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=read_targets(modules, "target_modules"),
        exclude_modules=read_excluded(fields.get("exclude_modules")),
        target_parameters=read_parameters(parameters),
        layers_to_transform=layers,
        layers_pattern=layers_pattern,
        before_0_19=_before_0_19(read_text(fields, "peft_version")),
        _ranks=read_table(ranks, "rank_pattern"),
        _alphas=read_table(alphas, "alpha_pattern"),
    )


def _before_0_19(peft_version: str | None) -> bool | None:
    """Whether that PEFT took fused experts for [E, in, out]; it did before 0.19."""
    match = re.match(r"([0-9]{1,4})\.([0-9]{1,4})", peft_version or "")
    return (int(match[1]), int(match[2])) < (0, 19) if match else None


def _ends_in(name: str, targets: frozenset[str]) -> bool:
    """Whether `name` is one of `targets` or ends in "." and one of them."""
    if name in targets:
        return True
    at = name.find(".")
    while at >= 0:
        if name[at + 1 :] in targets:
            return True
        at = name.find(".", at + 1)
    return False
