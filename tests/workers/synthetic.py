"""Adapters of random values for the demo model, of all kinds, straight in an object store."""

from __future__ import annotations

import random
from pathlib import Path

from loraplex.adapter_store import BaseModel, ObjectStore, adapter_digest, write_pack
from loraplex.workers import AdapterRef

from tests.adapter_store.stored_packs import TENANT, pack_key
from tests.adapters import random_canonical


def store_adapter(
    store: ObjectStore, base: BaseModel, folder: Path, seed: int, tenant_id: str = TENANT
) -> AdapterRef:
    """One of mixed rank, format, precision and size: from 20 KB to 1 MB."""
    rng = random.Random(seed)
    kind = rng.choice(["attention", "experts", "shared", "fused", "both"])
    rank = rng.choice([1, 2, 4, 8])
    layers = rng.sample(range(base.num_layers), rng.randint(1, 3))
    experts = rng.sample(range(base.num_experts), rng.randint(1, 6))
    projections = {e: (rank, rank, rng.choice([1, rank])) for e in experts}
    adapter = random_canonical(
        base,
        seed,
        rank,
        dense={} if kind in ("experts", "shared") else None,
        experts=() if kind == "attention" else experts if kind == "shared" else projections,
        layers=sorted(layers),
        fused_gate_up=kind == "fused",
        shared_a13=kind == "shared",
        shared_b2=kind == "shared",
        dtype=rng.choice(["F32", "BF16", "F16"]),
        std=0.2,  # so that no two adapters, and none and the base, answer alike
    )
    digest = adapter_digest(adapter)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / digest
    write_pack(path, adapter, digest)
    store.upload(path, pack_key(digest, tenant_id))
    path.unlink()
    return AdapterRef(tenant_id, digest)
