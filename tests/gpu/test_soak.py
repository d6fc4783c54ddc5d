"""Long random traffic with adapters coming and going, in memory that is poisoned when freed."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial

import pytest
from loraplex.workers import Engine, GenerationRequest, SamplingParams
from loraplex.workers.pool.adapter_pool import AdapterPool

from ..workers.conftest import TENANT, drain
from ..workers.conftest import demo as demo
from .layers import DEVICE, NEEDS_GPU

pytestmark = [*NEEDS_GPU, pytest.mark.soak, pytest.mark.timeout(1800)]
CHECKED_TOKENS = 10_000
PROBES, TOKENS = 80, 24
# In float32 logprobs of two batches differ by less than 1e-3: a token that leads by so much more is
# drawn in any batch.
CLEAR_LEAD = 0.02


@dataclass
class Probe:
    request: GenerationRequest
    expected: list[int]  # as long as every token leads clearly


def make_probes(engine: Engine, refs, rng: random.Random) -> list[Probe]:
    """Requests of the base model and of each adapter, answered one at a time."""
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, logprobs=2, ignore_eos=True)
    kinds = [None, *refs]
    probes = []
    for i in range(PROBES):
        prompt = tuple(rng.randrange(4, 4096) for _ in range(rng.randrange(1, 90)))
        request = GenerationRequest(f"{i}", prompt, params, TENANT, kinds[i % len(kinds)])
        engine.submit(request)
        result = drain(engine)[f"{i}"]
        tops = [x.top for out in result.outputs for x in out.logprobs]
        clear = [first[1] - second[1] > CLEAR_LEAD for first, second in tops]
        n = [*clear, False].index(False)
        if n:
            probes.append(Probe(request, result.tokens[:n]))
    return probes


def test_10000_tokens_are_each_their_own_adapters(demo, monkeypatch):
    rng = random.Random()
    limits = {"device": DEVICE.type, "dtype": "float32"}
    roomy = Engine(demo.config(**limits), demo.packs)
    probes = make_probes(roomy, demo.refs.values(), rng)
    roomy.close()
    of_adapters = {p.request.adapter for p in probes}
    assert of_adapters == {None, *demo.refs.values()}
    # Else a mistaken adapter could go unseen.
    assert sum(len(p.expected) for p in probes) > 5 * len(probes)

    monkeypatch.setattr(
        "loraplex.workers.model_runner.AdapterPool", partial(AdapterPool, poison=True)
    )
    # Room for two adapters of four, and for a few sequences.
    engine = Engine(
        demo.config(pool_bytes=7 << 20, kv_tokens=2048, max_batch_tokens=96, **limits), demo.packs
    )
    pending: dict[str, Probe] = {}
    answers: dict[str, list[int]] = {}
    checked = submitted = 0
    while checked < CHECKED_TOKENS or engine.has_work():
        if checked < CHECKED_TOKENS and len(pending) < 24:
            probe, key = rng.choice(probes), str(submitted)
            submitted += 1
            sampling = replace(probe.request.sampling, max_tokens=len(probe.expected))
            if rng.random() < 0.2:  # not checked: it is there to be in the same batches
                sampling = replace(sampling, temperature=1.0, seed=submitted)
            else:
                answers[key] = []
            pending[key] = probe
            engine.submit(replace(probe.request, request_id=key, sampling=sampling))
            if rng.random() < 0.03:
                gone = rng.choice(sorted(pending))
                engine.abort(gone)
                del pending[gone]
                answers.pop(gone, None)
            if rng.random() < 0.05:  # also while it is in use
                engine.purge(rng.choice(list(demo.refs.values())).key)
            if rng.random() < 0.7:
                continue
        for out in engine.step():
            assert out.error is None, out.error
            if out.request_id in answers:
                answers[out.request_id] += out.token_ids
            if out.finish_reason:
                probe = pending.pop(out.request_id)
                if out.request_id in answers:
                    assert answers.pop(out.request_id) == probe.expected
                    checked += len(probe.expected)
    report = engine.report()
    assert report.evictions > 50
    assert report.kv_blocks_used == 0
    pool = engine._runner.pool
    for ref in demo.refs.values():
        engine.purge(ref.key)
    assert pool.used_bytes == 0
    assert pool.buffer.isnan().any()  # freed memory was poisoned, and nobody read it
    engine.close()
