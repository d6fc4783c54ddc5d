"""Long random traffic over a small pool: every probe is answered as by a fresh engine, and
memory doesn't grow."""

from __future__ import annotations

import random
from dataclasses import replace

import psutil
import pytest

pytestmark = pytest.mark.soak
REQUESTS, WARM = 3000, 500
GROWTH_BYTES = 64 << 20


def test_probes_stay_right_and_memory_stays_flat(demo, make_engine, run, greedy):
    rng = random.Random()
    kinds = {"base": None, **demo.refs}
    probes = {
        name: greedy(f"probe-{name}", [7, 8, 9, 10], ref, max_tokens=8)
        for name, ref in kinds.items()
    }
    expected = {p.request_id: run(make_engine(), [p])[p.request_id].tokens for p in probes.values()}
    engine = make_engine(pool_bytes=7 << 20, kv_tokens=2048, max_batch_tokens=96, torch_threads=1)
    answers: dict[str, list[int]] = {}
    open_: set[str] = set()
    warm_bytes = 0
    for i in range(REQUESTS):
        ref = rng.choice(list(kinds.values()))
        prompt = [rng.randrange(4, 4096) for _ in range(rng.randrange(1, 90))]
        request = greedy(str(i), prompt, ref, max_tokens=rng.randrange(1, 20), logprobs=None)
        if rng.random() < 0.5:
            request = replace(request, sampling=replace(request.sampling, temperature=1.0, seed=i))
        engine.submit(request)
        open_.add(str(i))
        if i % 50 == 0:
            probe = rng.choice(list(probes.values()))
            if probe.request_id not in answers:
                answers[probe.request_id] = []
                engine.submit(probe)
        if rng.random() < 0.05:
            gone = rng.choice(sorted(open_))
            engine.abort(gone)
            open_.discard(gone)
        while engine.report().queued > 20:
            take(engine, answers, open_, expected)
        if i == WARM:
            warm_bytes = psutil.Process().memory_info().rss
    while engine.has_work():
        take(engine, answers, open_, expected)
    assert not open_
    assert not answers
    report = engine.report()
    assert report.kv_blocks_used == 0
    assert report.evictions > 20
    assert psutil.Process().memory_info().rss - warm_bytes < GROWTH_BYTES


def take(engine, answers, open_, expected) -> None:
    for out in engine.step():
        assert out.error is None
        if out.request_id in answers:
            answers[out.request_id] += out.token_ids
        if out.finish_reason:
            open_.discard(out.request_id)
            if out.request_id in answers:
                assert answers.pop(out.request_id) == expected[out.request_id]
