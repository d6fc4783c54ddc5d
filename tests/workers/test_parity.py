"""The engine against transformers + PEFT, float32, on the demo model and its adapters."""

from __future__ import annotations

import random

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-3
CASES = 60


@pytest.fixture(scope="module")
def oracles(demo):
    """transformers models by adapter name; PEFT can't hold these formats in one model."""

    def load(name: str | None):
        model = AutoModelForCausalLM.from_pretrained(
            demo.model, dtype=torch.float32, experts_implementation="eager"
        )
        if name:
            model = peft.PeftModel.from_pretrained(model, demo.folder / "adapters" / name)
        return model.eval()

    return {name: load(name) for name in (None, *demo.refs)}


@pytest.fixture(scope="module")
def cases(demo, oracles):
    """(adapter, prompt, the oracle's greedy continuation) with adapters taking turns."""
    rng = random.Random(20261)
    vocab = demo.config().model.vocab_size
    names = [None, *demo.refs]
    made = []
    for i in range(CASES):
        name = names[i % len(names)]
        prompt = [rng.randrange(4, vocab) for _ in range(rng.randrange(2, 70))]
        with torch.no_grad():
            ids = torch.tensor([prompt])
            out = oracles[name].generate(
                input_ids=ids, attention_mask=torch.ones_like(ids),
                max_new_tokens=10, min_new_tokens=10, do_sample=False,
            )  # fmt: skip
        made.append((name, prompt, out[0, len(prompt) :].tolist()))
    return made


def submit_all(cases, demo, greedy):
    # min_tokens as generate's min_new_tokens: end-of-sequence ids stay out of the argmax.
    return [
        greedy(str(i), prompt, demo.refs.get(name), max_tokens=10, min_tokens=10, prompt_logprobs=0)
        for i, (name, prompt, _) in enumerate(cases)
    ]


def check(results, cases, oracles):
    for i, (name, prompt, expected) in enumerate(cases):
        result = results[str(i)]
        assert result.tokens == expected, f"case {i}, adapter {name}"
        with torch.no_grad():
            logits = oracles[name](torch.tensor([prompt + expected])).logits[0]
        logprobs = logits.log_softmax(-1)[:-1]
        reference = logprobs.gather(1, torch.tensor((prompt + expected)[1:])[:, None])[:, 0]
        mine = torch.tensor(result.prompt_logprobs + result.logprobs)
        assert mine.shape == reference.shape
        assert (mine - reference).abs().max() <= TOLERANCE, f"case {i}, adapter {name}"


def test_60_cases_of_base_and_four_adapters_in_one_batch(
    demo, make_engine, run, greedy, cases, oracles
):
    results = run(make_engine(), submit_all(cases, demo, greedy))
    check(results, cases, oracles)


def test_odd_chunks_and_a_pool_that_holds_two_adapters_change_nothing(
    demo, make_engine, run, greedy, cases, oracles
):
    engine = make_engine(max_batch_tokens=13, max_running=7, pool_bytes=7 << 20, kv_tokens=1024)
    results = run(engine, submit_all(cases, demo, greedy))
    check(results, cases, oracles)
    assert engine.report().evictions > 0


def test_preemption_changes_nothing(demo, make_engine, run, greedy, cases):
    """Against an engine with room for all, whose results the tests above hold to the oracle."""
    requests = [
        greedy(str(i), prompt, demo.refs.get(name), max_tokens=60)
        for i, (name, prompt, _) in enumerate(cases[:8])
    ]
    roomy, tight = make_engine(), make_engine(kv_tokens=256)
    expected, results = run(roomy, requests), run(tight, requests)
    assert roomy.report().preemptions == 0
    assert tight.report().preemptions > 0
    for request_id, result in results.items():
        assert result.tokens == expected[request_id].tokens
        for mine, reference in zip(result.logprobs, expected[request_id].logprobs, strict=True):
            assert abs(mine - reference) <= 1e-4


def test_prefix_cache_hits_change_nothing(demo, make_engine, run, greedy, cases, oracles):
    engine = make_engine()
    for round_ in range(2):
        requests = [
            greedy(str(i), prompt, demo.refs.get(name), max_tokens=10, min_tokens=10)
            for i, (name, prompt, _) in enumerate(cases)
        ]
        results = run(engine, requests)
        for i, (_, _, expected) in enumerate(cases):
            assert results[str(i)].tokens == expected
        hits = engine.report().prefix_hit_tokens
        assert (hits > 0) == (round_ == 1)
    assert results["1"].outputs[0].cached_tokens == (len(cases[1][1]) - 1) // 16 * 16
