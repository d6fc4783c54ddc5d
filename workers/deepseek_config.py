"""What only DeepSeek's configs say: latent attention and routing by groups. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .layers.rope_parameters import Yarn, yarn_mscale


@dataclass(frozen=True)
class LatentSizes:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    The cache holds one latent a token and one rotated key, which all heads share. A head's key is
    `nope` columns expanded from the latent and the `rope` rotated ones; its value is expanded too.
    """

    q_rank: int | None  # of the queries' own latent; None: they are projected from the hidden state
    kv_rank: int
    nope: int
    rope: int
    value: int
    softmax_scale: float  # of q k^T

    @classmethod
    def from_config(
        cls, raw: Mapping[str, Any], rope: Mapping[str, Any], yarn: Yarn | None
    ) -> LatentSizes:
        """
        Args:
            rope: the config's rope parameters. yarn: the same as they are read, if they are YaRN's.
        """
        nope, rope_dim = raw["qk_nope_head_dim"], raw["qk_rope_head_dim"]
        scale = (nope + rope_dim) ** -0.5
        if yarn is not None and (all_dim := rope.get("mscale_all_dim")):
            # YaRN sharpens attention by way of cos and sin, which the columns that aren't rotated
            # don't see. So it is done here: once for queries, once for keys.
            scale *= yarn_mscale(yarn.factor, all_dim) ** 2
        return cls(
            q_rank=raw.get("q_lora_rank"),
            kv_rank=raw["kv_lora_rank"],
            nope=nope,
            rope=rope_dim,
            value=raw["v_head_dim"],
            softmax_scale=scale,
        )

    @property
    def head(self) -> int:
        """Size of a head's query and key."""
        return self.nope + self.rope

    @property
    def cached(self) -> int:
        """Size of what is cached of a token."""
        return self.kv_rank + self.rope


@dataclass(frozen=True)
class RoutingGroups:
    """Experts are chosen within the best groups of experts, and their weights are scaled.

    A group counts as much as its best expert ("softmax" scores, DeepSeek-V2) or as its
    best two ("sigmoid", DeepSeek-V3, where a learned bias counts in the choice but not in the
    weights).
    """

    scores: Literal["softmax", "sigmoid"]
    groups: int  # 1: all experts are one group
    chosen: int  # groups that experts are taken from
    scaling: float

    @property
    def counted(self) -> int:
        """Experts that a group is judged by."""
        return 1 if self.scores == "softmax" else 2

    @classmethod
    def from_config(cls, raw: Mapping[str, Any]) -> RoutingGroups:
        scores = _SCORES[raw["model_type"]]
        limited = scores == "sigmoid" or raw.get("topk_method") == "group_limited_greedy"
        grouped = limited and (raw.get("n_group") or 1) > 1
        return cls(
            scores=scores,
            groups=raw["n_group"] if grouped else 1,
            chosen=raw["topk_group"] if grouped else 1,
            scaling=raw.get("routed_scaling_factor") or 1.0,
        )


_SCORES: Mapping[str, Literal["softmax", "sigmoid"]] = {
    "deepseek_v2": "softmax",
    "deepseek_v3": "sigmoid",
}
_TOPK_METHODS = {
    "deepseek_v2": (None, "greedy", "group_limited_greedy"),
    "deepseek_v3": (None, "noaux_tc"),
}


def unserved_deepseek_options(raw: Mapping[str, Any]) -> dict[str, Any]:
    """As `families.unserved_options`, the ones that only these families have."""
    kind = raw["model_type"]
    values: dict[str, Any] = {}
    if raw.get("topk_method") not in _TOPK_METHODS[kind]:
        values["topk_method"] = raw["topk_method"]
    if raw.get("scoring_func") not in (None, _SCORES[kind]):
        values["scoring_func"] = raw["scoring_func"]
    if raw.get("moe_layer_freq") not in (None, 1):
        values["moe_layer_freq"] = raw["moe_layer_freq"]
    if raw.get("rope_interleave") is False:
        values["rope_interleave"] = False
    if raw.get("mlp_bias"):
        values["mlp_bias"] = raw["mlp_bias"]
    if kind == "deepseek_v2" and raw.get("norm_topk_prob"):
        # DeepSeek's own code and transformers' disagree about what it does to the scaling.
        values["norm_topk_prob"] = raw["norm_topk_prob"]
    return values
