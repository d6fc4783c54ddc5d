"""What a caller of the engine may rely on: limits, stops, errors, accounting."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import replace

import msgpack
import pytest
from loraplex.workers import AdapterRef, GenerationRequest, Grammar, SamplingParams


def test_stop_token_ends_with_stop_and_is_counted(make_engine, run, greedy):
    free = run(make_engine(), [greedy("a", [10, 11, 12])])["a"].tokens
    stop = free[4]
    out = run(make_engine(), [greedy("a", [10, 11, 12], stop_token_ids=(stop,))])["a"]
    assert out.tokens == free[: free.index(stop) + 1]
    assert out.last.finish_reason == "stop"


def test_max_tokens_ends_with_length(make_engine, run, greedy):
    out = run(make_engine(), [greedy("a", [10, 11, 12], max_tokens=3)])["a"]
    assert len(out.tokens) == 3
    assert out.last.finish_reason == "length"


def test_min_tokens_keeps_stop_tokens_away(make_engine, run, greedy):
    first = run(make_engine(), [greedy("a", [10, 11, 12])])["a"].tokens[0]
    params = {"stop_token_ids": (first,), "min_tokens": 5}
    out = run(make_engine(), [greedy("a", [10, 11, 12], **params)])["a"]
    assert first not in out.tokens[:5]
    assert len(out.tokens) >= 5


def test_the_context_ends_with_length(make_engine, run, greedy):
    engine = make_engine(max_model_len=40)
    out = run(engine, [greedy("a", range(10, 40), max_tokens=500)])["a"]
    assert len(out.tokens) == 10
    assert out.last.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "code"),
    [((), "empty_prompt"), (range(4, 44), "context_length_exceeded"), ((5, 4096), "invalid_token")],
)
def test_a_prompt_that_cant_be_served_is_refused_with_its_reason(
    make_engine, run, greedy, prompt, code
):
    engine = make_engine(max_model_len=40)
    results = run(engine, [greedy("bad", prompt), greedy("good", [10])])
    assert results["bad"].last.error_code == code
    assert results["bad"].last.finish_reason == "error"
    assert results["good"].last.finish_reason == "length"


def test_an_unknown_adapter_fails_its_own_request_only(demo, make_engine, run, greedy):
    missing = AdapterRef("acme", "0" * 64)
    results = run(make_engine(), [greedy("bad", [10], missing), greedy("good", [10])])
    assert results["bad"].last.error_code == "adapter_load_failed"
    assert results["good"].last.finish_reason == "length"


def test_an_adapter_larger_than_the_pool_is_refused_with_the_sizes(demo, make_engine, run, greedy):
    engine = make_engine(pool_bytes=1 << 20)
    results = run(engine, [greedy("big", [10], demo.refs["whaler"]), greedy("good", [10])])
    assert results["big"].last.error_code == "adapter_too_large"
    assert str(1 << 20) in (results["big"].last.error or "")
    assert results["good"].last.finish_reason == "length"


def test_an_adapter_of_another_base_is_refused(demo, make_engine, run, greedy):
    engine = make_engine(base_fingerprint="f" * 64)
    out = run(engine, [greedy("a", [10], demo.refs["devil"])])["a"]
    assert out.last.error_code == "adapter_load_failed"
    assert "another base" in (out.last.error or "")


def test_abort_frees_blocks_and_slots(demo, make_engine, greedy):
    engine = make_engine()
    for i, ref in enumerate(demo.refs.values()):
        engine.submit(greedy(str(i), range(10, 60), ref, max_tokens=100))
    while engine.report().running < 4:
        engine.step()
    assert engine.report().kv_blocks_used > 0
    for i in range(4):
        engine.abort(str(i))
    engine.abort("never seen")
    assert not engine.has_work()
    assert engine.report().kv_blocks_used == 0
    for ref in demo.refs.values():
        engine.purge(ref.key)
    assert engine.report().pool_bytes_used == 0


def test_nonfinite_logits_fail_that_request_alone(demo, make_engine, run, greedy):
    engine = make_engine()
    run(engine, [greedy("warm", [10], demo.refs["devil"]), greedy("w2", [10], demo.refs["hacker"])])
    tables = engine._runner.pool.dense[0]["o"]
    slot = engine._residency.acquire(demo.refs["devil"])[0]
    engine._residency.release(slot)
    offset = int(tables.offset_b[slot, 0])
    engine._runner.pool.buffer[offset] = float("nan")
    results = run(
        engine,
        [
            greedy("bad", [10, 11], demo.refs["devil"]),
            greedy("good", [10, 11], demo.refs["hacker"]),
            greedy("base", [10, 11]),
        ],
    )
    assert results["bad"].last.error_code == "nonfinite_logits"
    assert results["good"].last.finish_reason == "length"
    assert results["base"].last.finish_reason == "length"


def test_a_rare_adapter_is_not_starved_by_a_stream_of_resident_ones(demo, make_engine, greedy):
    """With room for one adapter, requests for the resident one must not keep the other out."""
    price = 1 + 2 * 6  # of one request of the stream, without its adapter's part
    engine = make_engine(pool_bytes=4 << 20, overtake_slack=4.0 * price)
    engine.submit(greedy("first", [10], demo.refs["whaler"], max_tokens=2000))
    while not engine.report().running:
        engine.step()
    engine.submit(greedy("rare", [10], demo.refs["scripture"], max_tokens=1))

    def still() -> bool:
        engine.step()
        return not engine.report().loading

    # The bound holds from when the pack is on this node and open: opening begins with a step.
    while not (still() and still()):
        pass
    finished: list[str] = []
    for i in range(60):
        engine.submit(greedy(f"s{i}", [10], demo.refs["whaler"], max_tokens=6))
        outputs = engine.step()
        engine.abort("first")
        for out in outputs:
            if out.finish_reason:
                assert out.error is None
                finished.append(out.request_id)
        if "rare" in finished:
            break
    assert "rare" in finished
    # Four requests' worth of work, and what had begun by then: one started in each step, for 6.
    assert len(finished) <= 1 + 4 + 6 + 1
    assert engine.report().evictions == 1


def test_prefetch_loads_what_the_controller_wants_but_evicts_nothing_in_use(
    demo, make_engine, greedy
):
    """Room for one large adapter, which is in use: the other waits, then replaces it."""
    engine = make_engine(pool_bytes=4 << 20)
    used, wanted = demo.refs["whaler"], demo.refs["scripture"]
    engine.submit(greedy("a", [10], used, max_tokens=30))
    engine.set_desired([wanted])
    deadline = time.monotonic() + 20
    while wanted.key not in engine.report().gpu and time.monotonic() < deadline:
        engine.set_desired([wanted])  # again and again, as the controller does
        running = engine.report().running
        if engine.has_work():
            engine.step()
        if running:
            assert used.key in engine.report().gpu
    assert set(engine.report().gpu) == {wanted.key}


def test_report_counts_tokens_by_adapter_and_survives_the_wire(demo, make_engine, run, greedy):
    engine = make_engine()
    ref = demo.refs["devil"]
    run(engine, [greedy("a", range(10, 30), ref, max_tokens=5), greedy("b", [4], max_tokens=3)])
    report = engine.report()
    assert report.prompt_tokens == {ref.key: 20, "acme/base": 1}
    assert report.output_tokens == {ref.key: 5, "acme/base": 3}
    assert type(report).from_wire(report.to_wire()) == report


def test_the_report_says_how_long_a_new_request_would_wait(demo, make_engine, run, greedy):
    engine = make_engine(max_running=2)
    run(engine, [greedy(f"r{i}", range(10, 40), max_tokens=6) for i in range(4)])
    idle = engine.report()
    assert idle.max_running == 2
    assert idle.token_s > 0
    assert idle.wait_s > 0
    for i in range(6):
        engine.submit(greedy(f"q{i}", range(10, 40), max_tokens=6))
    assert engine.report().wait_s > idle.wait_s + 6 * 30 * idle.token_s * 0.9


def test_random_traffic_with_aborts_leaves_nothing_behind(demo, make_engine, greedy):
    rng = random.Random()
    engine = make_engine(kv_tokens=512, pool_bytes=7 << 20, max_batch_tokens=40, max_running=9)
    live: set[str] = set()
    for i in range(120):
        ref = rng.choice([None, *demo.refs.values()])
        prompt = [rng.randrange(4, 4096) for _ in range(rng.randrange(1, 120))]
        request = greedy(str(i), prompt, ref, max_tokens=rng.randrange(1, 12))
        sampling = replace(request.sampling, temperature=rng.choice([0.0, 1.0]), logprobs=None)
        engine.submit(replace(request, sampling=sampling))
        live.add(str(i))
        if rng.random() < 0.15:
            victim = rng.choice(sorted(live))
            engine.abort(victim)
            live.discard(victim)
        for out in engine.step():
            assert out.error is None
            if out.finish_reason:
                live.discard(out.request_id)
        engine._kv.check_integrity()
    while engine.has_work():
        for out in engine.step():
            assert out.error is None
            if out.finish_reason:
                live.discard(out.request_id)
    assert not live
    assert engine.report().kv_blocks_used == 0


def test_model_folder_errors_name_the_file(demo, make_engine, tmp_path):
    from loraplex.workers import EngineConfig, ModelFilesInvalid, ModelUnsupported

    with pytest.raises(ModelFilesInvalid, match=r"config\.json does not exist"):
        _ = EngineConfig(str(tmp_path)).model
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelUnsupported, match="llama"):
        _ = EngineConfig(str(tmp_path)).model
    shutil.copy(demo.model / "config.json", tmp_path)
    with pytest.raises(ModelFilesInvalid, match="weights are missing"):
        make_engine(model_path=str(tmp_path))


def test_sampling_params_are_torch_free_and_round_trip():
    request = GenerationRequest(
        "r",
        (1, 2),
        SamplingParams(
            stop_token_ids=(3,),
            logprobs=2,
            min_p=0.1,
            presence_penalty=-1.5,
            logit_bias=((7, -100.0), (9, 2.5)),
            grammar=Grammar("choice", '["é"]'),
        ),
        "t",
        AdapterRef("t", "d" * 64),
        (9,),
    )
    assert GenerationRequest.from_wire(msgpack.unpackb(msgpack.packb(request.to_wire()))) == request
    older = request.to_wire()
    older["sampling"] = {"max_tokens": 3, "stop_token_ids": [1]}
    sampling = GenerationRequest.from_wire(older).sampling
    assert sampling == SamplingParams(max_tokens=3, stop_token_ids=(1,))
    assert not sampling.host_state
    assert request.sampling.host_state


def test_the_last_output_of_a_traced_request_says_where_its_time_went(
    demo, make_engine, run, greedy
):
    began = time.monotonic()
    traced = replace(greedy("a", [10, 11], demo.refs["devil"]), traceparent="00-1-2-01")
    results = run(make_engine(), [traced, greedy("b", [10, 11])])
    *earlier, last = results["a"].outputs
    assert all(out.spans is None for out in (*earlier, *results["b"].outputs))
    assert last.spans is not None
    assert list(last.spans) == ["queue", "load", "prefill", "decode"]
    assert all(seconds >= 0 for seconds in last.spans.values())
    assert 0 < sum(last.spans.values()) <= time.monotonic() - began


def test_the_report_tells_what_came_from_where_and_what_steps_did(demo, make_engine, run, greedy):
    engine = make_engine()
    refs = [demo.refs["devil"], demo.refs["whaler"], None]
    for start in (0, 3):
        run(engine, [greedy(f"r{start + i}", [10, 11, 12], r) for i, r in enumerate(refs)])
    report = engine.report()
    assert report.admissions == {"disk": 2, "gpu": 2, "base": 2}
    assert report.loads == {"disk": 2}
    assert report.tier_load_bytes == {"disk": sum(report.gpu.values())}
    assert report.tier_load_seconds["disk"] >= report.load_seconds > 0
    assert sum(report.queue_seconds.values()) > 0
    tokens = sum(report.prompt_tokens.values()) + sum(report.output_tokens.values())
    assert tokens >= report.step_tokens > sum(report.prompt_tokens.values())
    assert 2 <= report.step_adapters <= 2 * report.steps
    assert report.step_adapter_bytes > 0
    assert report.pool_bytes_active == 0
