"""Adapters of all kinds cycle through a pool that holds 20 and tiers that hold a part of them."""

from __future__ import annotations

import random

import pytest

from .churn import SLOTS, check_bytes, churning, run

GROWTH_BYTES = 32 << 20
WARM = 0.3  # of a run


def churn(store, folder, adapters: int, requests: int) -> list[int]:
    """Anonymous bytes of this process as the run went on."""
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    overlap = rng.random() < 0.5
    print("seed", seed, "overlap", overlap)
    with churning(store, folder, adapters, rng, overlap) as node:
        # Few adapters answer alike, so that a mix-up is seen.
        assert node.alike() < 0.02
        found = run(node, requests, rng)
        assert found.failed == []
        assert found.wrong == []
        assert found.requests + found.aborted == requests
        assert found.most_resident <= SLOTS
        assert found.evictions > SLOTS
        assert found.purged > 0
        for tier in ("host", "disk", "s3"):
            assert found.loads.get(tier, 0) > 0
        check_bytes(node)
    return found.anonymous_bytes


def test_every_answer_is_its_adapters_own_and_every_byte_is_accounted_for(store, tmp_path):
    churn(store, tmp_path, adapters=60, requests=400)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_so_do_those_of_2000_adapters_and_memory_stays_flat(store, tmp_path):
    anonymous = churn(store, tmp_path, adapters=2000, requests=20_000)
    warm = anonymous[int(len(anonymous) * WARM) :]
    assert max(warm) - warm[0] < GROWTH_BYTES, anonymous
