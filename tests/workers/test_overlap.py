"""A step launched before the last one's tokens are read gives what one after another gives."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from loraplex.workers import GenerationRequest, SamplingParams

from .lagging_engine import LaggingEngine


@pytest.fixture
def lagging(demo):
    """Overlapping engines on a device that lags behind."""
    made: list[LaggingEngine] = []

    def make(**changes: object) -> LaggingEngine:
        made.append(LaggingEngine(demo.config(overlap=True, **changes), demo.packs))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def random_request(
    rng: random.Random, demo, name: str, prompt_tokens: int = 90, output_tokens: int = 24
) -> GenerationRequest:
    greedy = rng.random() < 0.5
    params = SamplingParams(
        max_tokens=rng.choice([1, 1, 2, *(rng.randrange(3, output_tokens) for _ in range(4))]),
        min_tokens=rng.choice([0, 0, 2]),
        # Its draws need the host: such steps are one by one.
        repetition_penalty=1.3 if rng.random() < 0.1 else 1.0,
        temperature=0.0 if greedy else 0.9,
        # Batches round differently: with few candidates hardly ever so that a draw differs.
        top_k=rng.choice([3, 5]),
        seed=rng.randrange(1 << 30),
        logprobs=rng.choice([None, 0, 2]),
        prompt_logprobs=rng.choice([None, None, None, 1]),
        # So many that some answers end by one.
        stop_token_ids=tuple(rng.sample(range(4, 4096), rng.choice([0, 0, 400]))),
        ignore_eos=rng.random() < 0.5,
    )
    prompt = tuple(rng.randrange(4, 4096) for _ in range(rng.randrange(1, prompt_tokens)))
    ref = rng.choice([None, *demo.refs.values()])
    return GenerationRequest(name, prompt, params, "acme", ref)


def all_outputs(engine) -> list:
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    return outputs


def wait_for_packs(engine, demo) -> None:
    """Loads every adapter, so that requests start when they come; into the same slots always,
    which order a step."""
    for i, ref in enumerate(demo.refs.values()):
        params = SamplingParams(max_tokens=1)
        engine.submit(GenerationRequest(f"load {i}", (5,), params, "acme", ref))
        all_outputs(engine)


def test_outputs_come_in_the_same_order_with_the_same_usage(demo, make_engine, lagging):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    requests = [random_request(rng, demo, str(i)) for i in range(24)]
    # Goes on when the others, of which some may need the host at each step, have ended.
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    requests.append(GenerationRequest("longest", (5,), params, "acme"))
    one_by_one, overlapping = make_engine(overlap=False), lagging()
    got = []
    for engine in (one_by_one, overlapping):
        wait_for_packs(engine, demo)
        for request in requests:
            engine.submit(request)
        got.append(all_outputs(engine))
    assert overlapping.most_in_flight == 2
    for a, b in zip(*got, strict=True):
        assert (a.request_id, a.token_ids, a.finish_reason) == (
            b.request_id,
            b.token_ids,
            b.finish_reason,
        )
        assert (a.tier, a.cached_tokens) == (b.tier, b.cached_tokens)
        assert logprobs_of(a) == pytest.approx(logprobs_of(b), abs=1e-5)
    mine, reference = overlapping.report(), one_by_one.report()
    assert mine.output_tokens == reference.output_tokens
    assert mine.prompt_tokens == reference.prompt_tokens
    assert mine.kv_blocks_used == 0


def logprobs_of(output) -> list[float]:
    rows = [*output.logprobs, *(x for x in output.prompt_logprobs or () if x is not None)]
    return [v for x in rows for v in (x.logprob, *(p for _, p in x.top))]


@pytest.mark.parametrize(
    ("limits", "lengths"),
    [
        ({}, (90, 24)),
        ({"kv_tokens": 192, "max_batch_tokens": 40, "max_running": 9}, (12, 70)),  # preempts
        ({"pool_bytes": 5 << 20, "kv_tokens": 1024}, (90, 24)),  # the two large don't fit together
    ],
    ids=["room", "small cache", "small pool"],
)
def test_random_traffic_is_answered_as_one_by_one(demo, make_engine, lagging, run, limits, lengths):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    requests = {str(i): random_request(rng, demo, str(i), *lengths) for i in range(60)}
    for i in range(9):  # in the small cache these are too many, whatever else comes
        params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
        requests[str(i)] = replace(requests[str(i)], sampling=params)
    expected = run(make_engine(overlap=False, max_model_len=512), requests.values())
    engine = lagging(max_model_len=512, **limits)
    tokens: dict[str, list[int]] = {name: [] for name in requests}
    logprobs: dict[str, list[float]] = {name: [] for name in requests}
    reasons: dict[str, str] = {}
    aborted: set[str] = set()

    def take() -> None:
        for out in engine.step():
            assert out.error is None, out
            assert out.request_id not in reasons, "an output after the last"
            assert out.request_id not in aborted, "an output after its abort"
            tokens[out.request_id] += out.token_ids
            logprobs[out.request_id] += [x.logprob for x in out.logprobs]
            if out.finish_reason:
                reasons[out.request_id] = out.finish_reason
        engine._kv.check_integrity()

    for name, request in requests.items():
        engine.submit(request)
        for _ in range(rng.choice([0, 1, 1, 4]) if int(name) >= 9 else 0):
            take()
        if rng.random() < 0.15:
            open_ = [n for n in list(requests)[: int(name) + 1] if n not in reasons]
            if open_:
                victim = rng.choice(open_)
                aborted.add(victim)
                engine.abort(victim)
        if rng.random() < 0.1:
            engine.purge(rng.choice(list(demo.refs.values())).key)
    while engine.has_work():
        take()
    assert engine.most_in_flight == 2
    assert reasons.keys() | aborted == requests.keys()
    for name, reason in reasons.items():
        assert tokens[name] == expected[name].tokens, name
        assert reason == expected[name].last.finish_reason
        assert logprobs[name] == pytest.approx(expected[name].logprobs, abs=1e-4)
    for name in aborted - reasons.keys():
        assert tokens[name] == expected[name].tokens[: len(tokens[name])]
    report = engine.report()
    assert report.kv_blocks_used == 0
    if limits.get("kv_tokens") == 192:
        assert report.preemptions > 0
    if "pool_bytes" in limits:
        assert report.evictions > 0
    for ref in demo.refs.values():
        engine.purge(ref.key)
    assert engine.report().pool_bytes_used == 0


def test_blocks_and_slots_stay_held_while_a_step_names_them(demo, lagging, greedy):
    engine = lagging()
    wait_for_packs(engine, demo)
    ref = demo.refs["whaler"]
    engine.submit(greedy("a", range(10, 60), ref, max_tokens=40))
    for _ in range(5):
        engine.step()
    held = engine.report().kv_blocks_used
    engine.abort("a")
    engine.purge(ref.key)
    assert held > 0
    assert engine.report().kv_blocks_used == held
    assert ref.key in engine.report().gpu
    assert engine.has_work()
    assert engine.step() == []
    assert engine.report().kv_blocks_used == 0
    assert ref.key not in engine.report().gpu
    assert not engine.has_work()


def test_an_ended_request_leaves_no_trace_of_the_token_after_its_last(
    make_engine, lagging, run, greedy
):
    """Its stop token is only read when one more token is computed already."""
    prompt = list(range(40, 75))
    free = run(make_engine(overlap=False), [greedy("a", prompt)])["a"].tokens
    stop = next(t for i, t in enumerate(free) if i > 2 and t not in free[:i])
    stopped = greedy("a", prompt, stop_token_ids=(stop,))
    engine = lagging()
    first = run(engine, [stopped])["a"]
    assert first.tokens == free[: free.index(stop) + 1]
    assert engine.report().output_tokens == {"acme/base": len(first.tokens)}
    # The id may be used again, and cached blocks hold nothing but its own tokens.
    again = run(engine, [replace(stopped, prompt_ids=(*prompt, *first.tokens))])["a"]
    whole = run(make_engine(overlap=False), [greedy("b", [*prompt, *first.tokens])])["b"]
    assert again.outputs[0].cached_tokens > 0
    assert again.tokens == whole.tokens[: len(again.tokens)]
