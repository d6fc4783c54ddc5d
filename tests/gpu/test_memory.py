"""A GPU's memory is used up to the fraction that is asked for, and works up to its last byte."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from loraplex.workers import Engine, WorkerError

from ..workers.conftest import demo as demo
from .answers import REQUESTS, TOKENS, answers, answers_of, errors, first_difference, mixed_requests
from .layers import DEVICE, NEEDS_GPU

pytestmark = NEEDS_GPU
GIB = 1 << 30
FRACTION = 0.4
SIZES = {"kv_tokens": None, "pool_bytes": None, "memory_fraction": FRACTION}


def test_what_is_used_is_the_fraction_and_answers_from_its_far_end_are_right(demo):
    """Offsets of some 10 GiB don't fit 32 bits."""
    engine = Engine(
        demo.config(device=DEVICE.type, adapter_fraction=0.5, cuda_graphs=False, **SIZES),
        demo.packs,
    )
    free, total = torch.cuda.mem_get_info(DEVICE)
    assert FRACTION - 0.05 < 1 - free / total < FRACTION + 0.02
    pool, cache = engine._runner.pool, engine._runner.cache
    kv_bytes = cache.k.nbytes + cache.v.nbytes
    assert pool.total_bytes == pytest.approx(kv_bytes, rel=0.01)

    take_from_the_end(engine)
    requests = mixed_requests(demo.refs.values(), 4096)
    expected, found = answers(demo.config(), demo.packs, requests), answers_of(engine, requests)
    engine.close()
    assert errors(found, expected).max() <= 2e-3
    parted = [key for key in expected if first_difference(found[key], expected[key]) < TOKENS]
    assert len(parted) <= 0.05 * REQUESTS


def take_from_the_end(engine: Engine) -> None:
    """KV blocks, last first, and for adapters only the last 64 MiB of the pool."""
    kv, account = engine._kv, engine._runner.pool._account
    kv._free = OrderedDict.fromkeys(reversed(range(kv.total)))
    pages = account._pages[0]
    n = (64 << 20) // account.page_bytes
    pages._free = [(pages.total - n, n)]


def test_sizes_that_dont_fit_are_refused_with_what_there_is(demo):
    total = torch.cuda.mem_get_info(DEVICE)[1]
    config = demo.config(device=DEVICE.type, pool_bytes=total)
    with pytest.raises(WorkerError, match=rf"adapter pool {total / GIB:.2f} GiB, but .* leave"):
        Engine(config, demo.packs)
