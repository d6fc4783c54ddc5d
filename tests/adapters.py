"""Random canonical adapters for tests that need an adapter but no PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from loraplex.adapter_store import (
    BaseModel,
    CanonicalAdapter,
    DenseTarget,
    ExpertFactors,
    LoraFactors,
    canonical_adapter,
    canonical_layer,
)

ExpertRanks = tuple[int, int, int]  # gate, up, down; 0 = that projection isn't adapted


def tiny_base_model(
    *,
    num_layers: int = 2,
    hidden: int = 32,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 8,
    num_experts: int = 4,
    moe_intermediate: int = 16,
    name: str = "tiny",
) -> BaseModel:
    """A base model of made-up shapes; its fingerprint belongs to no weights."""
    q, kv = num_heads * head_dim, num_kv_heads * head_dim
    return BaseModel(
        name=name,
        fingerprint="ab" * 32,
        model_type="qwen3_moe",
        num_layers=num_layers,
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_experts=num_experts,
        moe_intermediate=moe_intermediate,
        dense_targets={
            "q_proj": DenseTarget(q, hidden, "column"),
            "k_proj": DenseTarget(kv, hidden, "column"),
            "v_proj": DenseTarget(kv, hidden, "column"),
            "o_proj": DenseTarget(hidden, q, "row"),
        },
        moe_layers=tuple(range(num_layers)),
        accepted_names=(name,),
    )


def random_canonical(
    base_model: BaseModel,
    seed: int,
    rank: int = 4,
    *,
    dense: Mapping[str, int] | None = None,
    experts: Mapping[int, ExpertRanks] | Iterable[int] | None = None,
    layers: Sequence[int] | None = None,
    fused_gate_up: bool = False,
    shared_a13: bool = False,
    shared_b2: bool = False,
    dtype: str = "F32",
    std: float = 0.1,
) -> CanonicalAdapter:
    """An adapter of random values, reproducible from its arguments.

    Args:
        rank: of everything that `dense` and `experts` don't give a rank for.
        dense: rank per attention target; None adapts all of them, {} none.
        experts: adapted expert ids, or ranks (gate, up, down) per id; None adapts all, () none.
        layers: adapted layers; None adapts all.
        fused_gate_up: gate and up of an expert share one A (their ranks must be equal).
        shared_a13: all experts share the A of gate and of up (ranks must be equal across experts).
        shared_b2: all experts share the B of down.
        dtype: "F32", "F16" or "BF16" (uint16 bits).
        std: of the factors' values. Scales are random in [0.5, 2).
    """
    rng = np.random.default_rng(seed)
    dense = dict.fromkeys(base_model.dense_targets, rank) if dense is None else dense
    ids = range(base_model.num_experts) if experts is None else experts
    ranks = dict(ids) if isinstance(ids, Mapping) else dict.fromkeys(ids, (rank, rank, rank))
    H, inter = base_model.hidden, base_model.moe_intermediate

    def draw(*shape: int) -> np.ndarray:
        return _cast(rng.normal(0, std, shape).astype(np.float32), dtype)

    def factors(r: int, a: np.ndarray, b: np.ndarray) -> LoraFactors | None:
        return LoraFactors(float(np.float32(rng.uniform(0.5, 2))), a, b) if r else None

    made = []
    for index in range(base_model.num_layers) if layers is None else layers:
        made_dense = {
            name: LoraFactors(
                float(np.float32(rng.uniform(0.5, 2))),
                draw(r, base_model.dense_targets[name].in_),
                draw(base_model.dense_targets[name].out, r),
            )
            for name, r in dense.items()
            if r
        }
        made_experts: dict[int, ExpertFactors] = {}
        shared: dict[str, np.ndarray] = {}
        for e, (gate, up, down) in ranks.items():
            a_gate = draw(gate, H)
            a_up = a_gate if fused_gate_up else draw(up, H)
            b_down = draw(H, down)
            if shared_a13:
                a_gate = shared.setdefault("gate", a_gate)
                a_up = shared.setdefault("up", a_up)
            if shared_b2:
                b_down = shared.setdefault("down", b_down)
            made_experts[e] = ExpertFactors(
                gate=factors(gate, a_gate, draw(inter, gate)),
                up=factors(up, a_up, draw(inter, up)),
                down=factors(down, draw(down, inter), b_down),
            )
        made.append(canonical_layer(index, made_dense, made_experts))
    return canonical_adapter(base_model, made)


def widen(array: np.ndarray) -> np.ndarray:
    """Any factor dtype as float32."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def dense_delta(factors: LoraFactors) -> np.ndarray:
    """The weight update scale * b @ a, [out, in], in float32."""
    return np.float32(factors.scale) * (widen(factors.b) @ widen(factors.a))


def _cast(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "F32":
        return array
    if dtype == "F16":
        return array.astype(np.float16)
    return (array.view(np.uint32) >> 16).astype(np.uint16)  # truncation is fine for a test
