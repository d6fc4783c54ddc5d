"""What goes wrong with one request or one adapter stays with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from loraplex.adapter_store import Pack
from loraplex.workers import AdapterRef, EngineConfig
from loraplex.workers.pool.packs import PackFetcher


def test_an_adapter_whose_load_fails_leaves_its_slot_and_pages(
    demo, make_engine, run, greedy, monkeypatch
):
    engine = make_engine()
    spans = Pack.spans
    broken = demo.refs["devil"].digest

    def fails(pack, layer):
        if pack.digest == broken:
            raise OSError("unreadable")
        return spans(pack, layer)

    monkeypatch.setattr(Pack, "spans", fails)
    bad = run(engine, [greedy("bad", [10, 11], demo.refs["devil"])])["bad"]
    assert bad.last.error_code == "adapter_load_failed"
    assert engine.report().pool_bytes_used == 0
    good = run(engine, [greedy("good", [10, 11], demo.refs["hacker"])])["good"]
    assert good.last.finish_reason == "length", good.last


def test_what_is_left_in_the_cache_by_nonfinite_requests_reaches_nobody(
    demo, make_engine, run, greedy
):
    engine = make_engine(kv_tokens=64, max_model_len=64)
    prompt = list(range(10, 60))
    expected = run(engine, [greedy("base", prompt)])["base"].tokens
    cache = engine._runner.cache
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    engine._kv.forget("acme/base")
    again = run(engine, [greedy("again", prompt)])["again"]
    assert again.last.finish_reason == "length", again.last
    assert again.tokens == expected


def test_a_cache_of_a_part_of_a_block_more_serves_no_more(demo, make_engine, run, greedy):
    engine = make_engine(kv_tokens=56, block_size=16)
    results = run(
        engine,
        [greedy("long", range(10, 62)), greedy("grows", range(10, 40), max_tokens=100)],
    )
    assert results["long"].last.error_code == "context_length_exceeded"
    assert results["grows"].last.finish_reason == "length"
    assert len(results["grows"].tokens) == 48 - 30


def test_a_continuation_that_has_all_of_its_tokens_ends_at_once(make_engine, run, greedy):
    engine = make_engine(kv_tokens=64)
    full = replace(greedy("full", range(10, 40), max_tokens=100), output_ids=tuple(range(5, 55)))
    done = replace(greedy("done", [10, 11], max_tokens=3), output_ids=(5, 6, 7))
    results = run(engine, [full, done, greedy("other", [10, 11])])
    for name in ("full", "done"):
        assert results[name].last.finish_reason == "length"
        assert results[name].tokens == []
    assert len(results["other"].tokens) == 12


def test_a_continuations_tokens_are_checked(demo, make_engine, run, greedy):
    engine = make_engine()
    bad = replace(greedy("bad", [10, 11]), output_ids=(1 << 20,))
    results = run(engine, [bad, greedy("good", [10, 11])])
    assert results["bad"].last.error_code == "invalid_token"
    assert results["good"].last.finish_reason == "length"


def test_cached_tokens_are_counted_once_however_often_admission_fails(make_engine, run, greedy):
    engine = make_engine(kv_tokens=96, max_model_len=96)
    prefix = list(range(10, 42))
    run(engine, [greedy("warm", prefix, max_tokens=1)])
    long = greedy("holds", prefix[::-1], max_tokens=30)
    waits = greedy("waits", [*prefix, *range(50, 70)], max_tokens=2)
    hits = engine.report().prefix_hit_tokens
    results = run(engine, [long, waits])
    sent = sum(o.cached_tokens for r in results.values() for o in r.outputs)
    assert engine.report().prefix_hit_tokens - hits == sent


class _Flaky:
    def __init__(self) -> None:
        self.calls = 0

    def ensure(self, tenant_id: str, digest: str, wanted: object = None):
        self.calls += 1
        raise OSError("the store is away")


def test_a_failed_fetch_that_nobody_asked_after_is_not_told_to_the_next_request():
    source = _Flaky()
    fetcher = PackFetcher(source, 1)  # type: ignore[arg-type]
    ref = AdapterRef("acme", "0" * 64)
    fetcher.start(ref)
    with pytest.raises(OSError, match="away"):
        fetcher._futures[ref.key].result()
    fetcher.start(ref)  # a new request's
    with pytest.raises(OSError, match="away"):
        fetcher._futures[ref.key].result()
    assert source.calls == 2
    with pytest.raises(OSError, match="away"):
        fetcher.poll(ref)  # tells what came, and forgets it
    assert source.calls == 2
    fetcher.close()


def test_the_context_of_a_config_is_whole_blocks(demo):
    config: EngineConfig = demo.config(kv_tokens=100, block_size=16)
    assert config.context_length == 96


def test_a_purged_adapters_running_request_leaves_no_prefix(demo, make_engine, greedy):
    engine = make_engine()
    ref = demo.refs["devil"]
    engine.submit(greedy("a", range(10, 40), ref, max_tokens=60))
    while not engine.report().running:
        engine.step()
    engine.purge(ref.key)
    while engine.has_work():
        engine.step()
    assert ref.key not in engine._kv._owner_of
