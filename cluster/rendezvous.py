"""Rendezvous (highest random weight) hashing: every process ranks the nodes alike, without talking.

When a node leaves, only the keys that it ranked first for move; when one joins, only the keys that
it now ranks first for do (Thaler and Ravishankar, 1998).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b

import numpy as np

_MASK = (1 << 64) - 1
_VECTOR_FROM = 24  # nodes from which numpy is faster


@lru_cache(maxsize=1 << 16)
def name_hash(name: str) -> int:
    """64-bit blake2b of a name; unlike `hash`, the same in every process."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def score(key_hash: int, node: str) -> int:
    """Weight of `node` for a key's 64-bit hash, uniform over [0, 2^64).

    The two hashes are mixed by murmur3's 64-bit finaliser: one blake2b per name instead of one
    per (key, node) pair, which is what a pick among many nodes would spend its time on.
    """
    x = (key_hash ^ name_hash(node)) & _MASK
    x ^= x >> 33
    x = x * 0xFF51AFD7ED558CCD & _MASK
    x ^= x >> 33
    x = x * 0xC4CEB9FE1A85EC53 & _MASK
    return x ^ x >> 33


def rank(key: str | int, nodes: Iterable[str]) -> list[str]:
    """All nodes, the best for `key` first. `key` is a name or already a 64-bit hash."""
    key_hash = name_hash(key) if isinstance(key, str) else key
    names = tuple(nodes)
    if len(names) < _VECTOR_FROM:
        return [node for _, node in sorted([(-score(key_hash, node), node) for node in names])]
    x = _hashes(names) ^ np.uint64(key_hash & _MASK)  # `score`, for all of them at once
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xFF51AFD7ED558CCD)
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xC4CEB9FE1A85EC53)
    x ^= x >> np.uint64(33)
    order = np.argsort(~x, kind="stable").tolist()
    return [names[i] for i in order]


@lru_cache(maxsize=64)
def _hashes(names: tuple[str, ...]) -> np.ndarray:
    """uint64 [names]."""
    return np.array([name_hash(name) for name in names], dtype=np.uint64)


def pick(key: str | int, nodes: Iterable[str]) -> str | None:
    """The best node for `key`; None when there are no nodes."""
    key_hash = name_hash(key) if isinstance(key, str) else key
    return min(nodes, key=lambda node: (-score(key_hash, node), node), default=None)
