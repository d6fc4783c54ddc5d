"""Small uploads for tests of the store: random attention adapters of a tiny base model."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from loraplex.adapter_store import (
    AdapterVersion,
    BaseModel,
    Catalogue,
    ObjectStore,
    Publisher,
    VersionMeta,
)
from safetensors.numpy import save

from tests.adapters import tiny_base_model

BASE = tiny_base_model()
META = VersionMeta(nbytes=1000, rank_max=4, format="attention", targets=("q_proj",))


@dataclass(frozen=True)
class Upload:
    config: bytes
    weights: bytes


def upload(seed: int, *, rank: int = 4, base: BaseModel = BASE, broken: bool = False) -> Upload:
    """An adapter of random values; its content, and so its digest, follows from `seed`.

    Args:
        broken: put a NaN into it.
    """
    rng = np.random.default_rng(seed)
    q = base.dense_targets["q_proj"]
    tensors = {}
    for layer in range(base.num_layers):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{module}.lora_A.weight"] = rng.normal(size=(rank, q.in_)).astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = rng.normal(size=(q.out, rank)).astype(np.float32)
        if broken:
            tensors[f"{module}.lora_B.weight"][3, 1] = np.nan
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": base.name,
    }
    return Upload(json.dumps(config).encode(), save(tensors))


class Service:
    """A catalogue and a publisher over one store."""

    def __init__(self, store: ObjectStore, scratch: Path) -> None:
        self.store = store
        self.catalogue = Catalogue(store)
        self.publisher = Publisher(store, self.catalogue, BASE, scratch)
        self.tenant_id = self.catalogue.create_tenant("acme").id

    def publish(self, name: str, files: Upload) -> AdapterVersion:
        upload_id = uuid.uuid4().hex
        self.publisher.stage_upload(self.tenant_id, upload_id, files.config, files.weights)
        return self.publisher.ingest(self.tenant_id, name, upload_id)

    def keys(self, prefix: str = "") -> set[str]:
        return {item.key for item in self.store.list(prefix)}

    def blob_keys(self) -> set[str]:
        return self.keys(f"tenants/{self.tenant_id}/blobs/")
