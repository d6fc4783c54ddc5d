"""A request's result doesn't depend on what shares its batch, its prefix or its pool."""

from __future__ import annotations

import random

import pytest
from loraplex.workers import AdapterRef, GenerationRequest, SamplingParams


@pytest.mark.parametrize("name", [None, "scripture", "whaler", "hacker", "devil"])
def test_logprobs_are_within_1e_5_whatever_else_is_in_the_batch(
    demo, make_engine, run, greedy, name
):
    rng = random.Random()
    prompt = [rng.randrange(4, 4096) for _ in range(33)]
    probe = greedy("probe", prompt, demo.refs.get(name), prompt_logprobs=0)
    alone = run(make_engine(), [probe])["probe"]
    others = [
        greedy(f"o{i}", [rng.randrange(4, 4096) for _ in range(rng.randrange(1, 90))], ref)
        for i, ref in enumerate([None, *demo.refs.values()] * 4)
    ]
    rng.shuffle(others)
    crowd = run(make_engine(), [*others[:10], probe, *others[10:]])["probe"]
    assert crowd.tokens == alone.tokens
    for mine, reference in zip(
        crowd.logprobs + crowd.prompt_logprobs, alone.logprobs + alone.prompt_logprobs, strict=True
    ):
        assert abs(mine - reference) <= 1e-5


def test_prefixes_are_not_shared_between_tenants_or_adapters(demo, make_engine, run, greedy):
    engine = make_engine()
    prompt = list(range(100, 180))
    assert run(engine, [greedy("a", prompt)])["a"].outputs[0].cached_tokens == 0
    assert run(engine, [greedy("b", prompt)])["b"].outputs[0].cached_tokens > 0
    adapted = greedy("c", prompt, demo.refs["devil"])
    assert run(engine, [adapted])["c"].outputs[0].cached_tokens == 0
    params = SamplingParams(max_tokens=2, temperature=0.0)
    other = GenerationRequest("d", tuple(prompt), params, "globex")
    assert run(engine, [other])["d"].outputs[0].cached_tokens == 0


def test_a_purged_adapter_is_gone_and_its_prefixes_too(demo, make_engine, run, greedy):
    engine = make_engine()
    ref = demo.refs["whaler"]
    prompt = list(range(100, 180))
    run(engine, [greedy("a", prompt, ref)])
    assert ref.key in engine.report().gpu
    engine.purge(ref.key)
    assert ref.key not in engine.report().gpu
    assert ref.key in demo.packs.removed
    assert run(engine, [greedy("b", prompt, ref)])["b"].outputs[0].cached_tokens == 0


def test_counts_of_a_purged_adapter_go_once_they_were_all_reported(demo, make_engine, run, greedy):
    engine = make_engine()
    ref, prompt, other = demo.refs["whaler"], list(range(200, 240)), list(range(300, 340))
    first = run(engine, [greedy("a", prompt, ref)])["a"]
    engine.submit(greedy("b", other, ref))
    more = len(engine.step())
    engine.purge(ref.key)
    while engine.has_work():
        # A request still runs: its own counts would be lost.
        assert ref.key in engine.report().output_tokens
        more += len(engine.step())
    last = engine.report()
    assert last.prompt_tokens[ref.key] == len(prompt) + len(other)
    assert last.output_tokens[ref.key] == len(first.tokens) + more
    after = engine.report()
    assert ref.key not in after.prompt_tokens | after.output_tokens
    run(engine, [greedy("c", prompt, ref)])
    assert engine.report().output_tokens == {ref.key: len(first.tokens)}


def test_an_adapter_purged_in_use_serves_to_the_end(demo, make_engine, run, greedy):
    engine = make_engine()
    ref = demo.refs["hacker"]
    prompt = list(range(200, 240))
    reference = run(make_engine(), [greedy("x", prompt, ref)])["x"].tokens
    engine.submit(greedy("x", prompt, ref))
    tokens, purged = [], False
    while engine.has_work():
        tokens += [t for out in engine.step() for t in out.token_ids]
        if len(tokens) >= 5 and not purged:
            engine.purge(ref.key)
            purged = True
    assert purged
    assert tokens == reference
    assert ref.key not in engine.report().gpu
    assert engine.report().pool_bytes_used == 0


def test_an_adapter_purged_while_requests_wait_for_it_goes_with_the_last(
    demo, make_engine, run, greedy
):
    engine = make_engine(max_running=1)
    ref, prompt = demo.refs["hacker"], list(range(200, 240))
    reference = run(make_engine(), [greedy("x", prompt, ref)])["x"].tokens
    engine.submit(greedy("x", prompt, ref))
    engine.submit(greedy("y", prompt, ref))
    engine.purge(ref.key)
    tokens = {"x": [], "y": []}
    while engine.has_work():
        for out in engine.step():
            assert out.error is None
            tokens[out.request_id] += out.token_ids
    assert tokens == {"x": reference, "y": reference}
    assert ref.key not in engine.report().gpu
    assert engine.report().pool_bytes_used == 0


def test_seeded_sampling_draws_the_same_in_any_batch(demo, make_engine, run):
    params = SamplingParams(max_tokens=20, temperature=0.9, top_p=0.9, top_k=50, seed=7)
    probe = GenerationRequest("p", (5, 6, 7, 8), params, "acme", demo.refs["devil"])
    alone = run(make_engine(), [probe])["p"].tokens
    others = [
        GenerationRequest(f"o{i}", (9 + i, 11), SamplingParams(max_tokens=15, seed=i), "acme", ref)
        for i, ref in enumerate(demo.refs.values())
    ]
    assert run(make_engine(), [*others, probe])["p"].tokens == alone


def test_a_continuation_goes_on_exactly_where_the_first_run_stopped(demo, make_engine, run):
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=3)
    ref: AdapterRef = demo.refs["scripture"]
    whole = run(make_engine(), [GenerationRequest("p", (5, 6, 7, 8), params, "acme", ref)])["p"]
    for cut in (1, 9, len(whole.tokens) - 1):
        rest = GenerationRequest(
            "p", (5, 6, 7, 8), params, "acme", ref, output_ids=tuple(whole.tokens[:cut])
        )
        again = run(make_engine(), [rest])["p"]
        assert whole.tokens[:cut] + again.tokens == whole.tokens
        assert again.last.finish_reason == whole.last.finish_reason
