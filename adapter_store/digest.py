"""The content id of an adapter: what it does to which model, not how it was uploaded."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from .canonical import EXPERT_PROJECTIONS, CanonicalAdapter, CanonicalLayer, LoraFactors, to_dtype

DIGEST_VERSION = 1


def adapter_digest(adapter: CanonicalAdapter) -> str:
    """sha256 hex of (digest version, base fingerprint, effective config, factors).

    The factors are hashed in the adapter's dtype and PEFT's orientation: per layer, dense targets
    by name, then experts by id with gate, up, down; A before B. Two uploads get one digest exactly
    when every projection has the same A, B and scale, bit by bit, in one dtype: key naming, key
    order and metadata don't count. A product B @ A factored otherwise is another adapter.
    """
    config = {
        "digest_version": DIGEST_VERSION,
        "base_fingerprint": adapter.base.fingerprint,
        "dtype": adapter.dtype,
        "layers": [_layer_config(layer) for layer in adapter.layers],
    }
    text = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    sha = hashlib.sha256(len(text).to_bytes(8, "little") + text)
    for layer in adapter.layers:
        for factors in layer.factors():
            for array in (factors.a, factors.b):
                sha.update(np.ascontiguousarray(to_dtype(array, adapter.dtype)).data)
    return sha.hexdigest()


def _layer_config(layer: CanonicalLayer) -> dict[str, Any]:
    return {
        "index": layer.index,
        "dense": {name: _factor_config(f) for name, f in layer.dense.items()},
        "experts": {
            str(e): {
                name: _factor_config(f)
                for name, f in zip(EXPERT_PROJECTIONS, expert.projections(), strict=True)
                if f is not None
            }
            for e, expert in layer.experts.items()
        },
        "flags": [layer.fused_gate_up, layer.shared_a13, layer.shared_b2],
    }


def _factor_config(factors: LoraFactors) -> list[float]:
    return [factors.rank, factors.scale]
