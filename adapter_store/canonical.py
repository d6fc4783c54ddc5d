"""The one form that every accepted adapter is brought into before it is hashed and packed.

Factors keep PEFT's orientation: `a` [rank, in], `b` [out, rank], delta = scale * b @ a. Arrays may
be strided views of a mapped file; a dtype of uint16 means BF16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from .base_model import BaseModel

DtypeName = Literal["F32", "F16", "BF16"]

NUMPY_DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}

EXPERT_PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """One projection's update scale * b @ a. a [rank, in], b [out, rank]; scale is a float32."""

    scale: float
    a: np.ndarray
    b: np.ndarray

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class ExpertFactors:
    """The adapted projections of one expert; None leaves a projection alone.

    gate and up: a [rank, H], b [I, rank]. down: a [rank, I], b [H, rank].
    """

    gate: LoraFactors | None = None
    up: LoraFactors | None = None
    down: LoraFactors | None = None

    def projections(self) -> tuple[LoraFactors | None, LoraFactors | None, LoraFactors | None]:
        return self.gate, self.up, self.down

    @property
    def rank(self) -> tuple[int, int, int]:
        """Ranks of gate, up and down; 0 = not adapted."""
        return cast("tuple[int, int, int]", tuple(p.rank if p else 0 for p in self.projections()))

    @property
    def scale(self) -> tuple[float, float, float]:
        """Scales of gate, up and down; 0.0 where not adapted."""
        return cast(
            "tuple[float, float, float]", tuple(p.scale if p else 0.0 for p in self.projections())
        )


@dataclass(frozen=True, eq=False)
class CanonicalLayer:
    """What an adapter does to one layer. Made by `canonical_layer`, which sets the flags.

    Attributes:
        dense: attention projections by target name, sorted by name.
        experts: adapted experts by id, ascending.
        fused_gate_up: gate and up of every expert have one rank and one A.
        shared_a13: all of `experts` (two or more) have the same A of gate and of up.
        shared_b2: all of `experts` (two or more) have the same B of down.
    """

    index: int
    dense: Mapping[str, LoraFactors]
    experts: Mapping[int, ExpertFactors]
    fused_gate_up: bool
    shared_a13: bool
    shared_b2: bool

    def factors(self) -> Iterator[LoraFactors]:
        """Every adapted projection, dense ones first, experts in ascending order."""
        yield from self.dense.values()
        for expert in self.experts.values():
            yield from (p for p in expert.projections() if p is not None)


@dataclass(frozen=True, eq=False)
class CanonicalAdapter:
    """A whole adapter. `layers` holds the adapted layers only, ascending by index."""

    base: BaseModel
    dtype: DtypeName
    layers: tuple[CanonicalLayer, ...]

    @property
    def rank_max(self) -> int:
        return max(f.rank for layer in self.layers for f in layer.factors())

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of what is adapted anywhere: "q_proj", ..., "experts.gate", ..., sorted."""
        names: set[str] = set()
        for layer in self.layers:
            names.update(layer.dense)
            for expert in layer.experts.values():
                pairs = zip(EXPERT_PROJECTIONS, expert.projections(), strict=True)
                names.update(f"experts.{name}" for name, p in pairs if p is not None)
        return tuple(sorted(names))


def canonical_layer(
    index: int, dense: Mapping[str, LoraFactors], experts: Mapping[int, ExpertFactors]
) -> CanonicalLayer:
    """Orders the parts and finds out what is shared, by comparing values.

    The flags follow from the values alone, so that one adapter gets one digest and one pack
    whichever format it came in: the per-expert form of a fused adapter repeats A for gate and up.
    """
    experts = {e: experts[e] for e in sorted(experts) if any(experts[e].rank)}
    parts = list(experts.values())
    return CanonicalLayer(
        index=index,
        dense={name: dense[name] for name in sorted(dense)},
        experts=experts,
        fused_gate_up=any(p.rank[0] for p in parts) and all(_is_fused(p) for p in parts),
        shared_a13=len(parts) > 1
        and any(parts[0].rank[:2])
        and all(
            p.rank[:2] == parts[0].rank[:2]
            and _same_a(p.gate, parts[0].gate)
            and _same_a(p.up, parts[0].up)
            for p in parts[1:]
        ),
        shared_b2=len(parts) > 1
        and parts[0].rank[2] > 0
        and all(
            p.rank[2] == parts[0].rank[2] and _same_b(p.down, parts[0].down) for p in parts[1:]
        ),
    )


def canonical_adapter(base: BaseModel, layers: Iterable[CanonicalLayer]) -> CanonicalAdapter:
    """Drops layers that nothing adapts, sorts the rest and finds the common dtype.

    Factors of more than one dtype make an F32 adapter, which holds all of them exactly.
    """
    kept = sorted((x for x in layers if x.dense or x.experts), key=lambda x: x.index)
    dtypes = {array.dtype for x in kept for f in x.factors() for array in (f.a, f.b)}
    names = [name for name, dtype in NUMPY_DTYPES.items() if dtype in dtypes]
    dtype = names[0] if len(names) == 1 else "F32"
    return CanonicalAdapter(base, cast("DtypeName", dtype), tuple(kept))


def to_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` in `dtype`: unchanged when it is that already, else widened to F32 exactly."""
    if array.dtype == NUMPY_DTYPES[dtype]:
        return array
    if dtype != "F32":
        raise ValueError(f"factors are widened to F32 only, not {array.dtype} to {dtype}")
    if array.dtype == NUMPY_DTYPES["BF16"]:
        return (array.astype("<u4") << np.uint32(16)).view("<f4")
    return array.astype("<f4")


def _is_fused(expert: ExpertFactors) -> bool:
    return expert.rank[0] == expert.rank[1] and _same_a(expert.gate, expert.up)


def _same_a(x: LoraFactors | None, y: LoraFactors | None) -> bool:
    return x is y or (x is not None and y is not None and _same(x.a, y.a))


def _same_b(x: LoraFactors | None, y: LoraFactors | None) -> bool:
    return x is y or (x is not None and y is not None and _same(x.b, y.b))


def _same(x: np.ndarray, y: np.ndarray) -> bool:
    """Bit equality. The first row settles it for nearly every pair that differs."""
    if x is y:
        return True
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    bits = np.dtype(f"<u{x.dtype.itemsize}")
    return bool(
        np.array_equal(x[:1].view(bits), y[:1].view(bits))
        and np.array_equal(x.view(bits), y.view(bits))
    )
