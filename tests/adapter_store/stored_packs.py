"""Packs put straight into a store, of any size, without an upload: for tests of the tiers."""

from __future__ import annotations

from pathlib import Path

from loraplex.adapter_store import ObjectStore, adapter_digest, write_pack

from tests.adapters import random_canonical, tiny_base_model

TENANT = "t-0123456789abcdef"
MIB = 1 << 20


def store_pack(
    store: ObjectStore, folder: Path, seed: int, mib: float = 0.1, tenant_id: str = TENANT
) -> str:
    """A pack of about so many MiB, with random content; its digest."""
    hidden = 256
    base = tiny_base_model(num_layers=1, hidden=hidden, num_experts=1, moe_intermediate=16)
    # A13, both of rank r, B2, and three of the cut kind: r * (3 * 256 + 3 * 16) floats.
    rank = max(1, round(mib * MIB / (4 * (3 * hidden + 48))))
    adapter = random_canonical(base, seed, rank=rank, dense={})
    digest = adapter_digest(adapter)
    path = folder / f"{digest}.made"
    folder.mkdir(parents=True, exist_ok=True)
    write_pack(path, adapter, digest)
    store.upload(path, pack_key(digest, tenant_id))
    path.unlink()
    return digest


def pack_key(digest: str, tenant_id: str = TENANT) -> str:
    return f"tenants/{tenant_id}/blobs/{digest}/{'0' * 16}/pack-v1.bin"
