"""Penalties look at a sequence's own tokens, through batches, preemption and continuations."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from loraplex.workers import GenerationRequest, SamplingParams
from loraplex.workers.sampling.penalties import TokenCounts

from .conftest import TENANT


def test_counts_are_those_of_the_generated_tokens():
    rng = random.Random()
    prompt = rng.choices(range(500), k=300)
    output = rng.choices(range(900), k=700)
    counts = TokenCounts(prompt, output[:200])
    for token in output[200:]:
        counts.add(token)
    assert sorted(counts.ids.tolist()) == sorted({*prompt, *output})
    seen = Counter(output)
    assert {t: seen[t] for t in counts.ids.tolist()} == dict(
        zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)
    )


def ask(name: str, **sampling) -> GenerationRequest:
    params = SamplingParams(**{"max_tokens": 40, "ignore_eos": True, **sampling})
    return GenerationRequest(name, tuple(range(10, 40)), params, TENANT)


def test_a_bias_repeats_a_token_until_a_penalty_outweighs_it(make_engine, run):
    biased = {"temperature": 0.0, "logit_bias": ((77, 40.0),)}
    results = run(
        make_engine(),
        [
            ask("free", **biased),
            ask("frequency", **biased, frequency_penalty=2.0),
            ask("repetition", **biased, repetition_penalty=100.0),
        ],
    )
    assert results["free"].tokens == [77] * 40
    frequency = results["frequency"].tokens
    assert frequency[:5] == [77] * 5
    assert frequency.count(77) < 40
    assert results["repetition"].tokens.count(77) == 1


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.5}, {"presence_penalty": 1.8}, {"frequency_penalty": 1.3}]
)
def test_a_continuation_is_penalised_for_what_was_said_before_it(make_engine, run, penalty):
    request = ask("a", seed=random.getrandbits(40), temperature=0.9, **penalty)
    whole = run(make_engine(), [request])["a"].tokens
    free = run(make_engine(), [ask("a", seed=request.sampling.seed, temperature=0.9)])["a"].tokens
    assert whole != free
    cut = random.randrange(1, len(whole))
    rest = GenerationRequest(
        "a", request.prompt_ids, request.sampling, TENANT, None, tuple(whole[:cut])
    )
    assert run(make_engine(), [rest])["a"].tokens == whole[cut:]


def test_preempted_sequences_keep_their_penalties(make_engine, run):
    requests = [
        GenerationRequest(
            str(i),
            tuple(range(10 + i, 60 + i)),
            SamplingParams(max_tokens=60, ignore_eos=True, seed=i, repetition_penalty=1.4),
            TENANT,
        )
        for i in range(6)
    ]
    tight = make_engine(kv_tokens=256)
    results = run(tight, requests)
    assert tight.report().preemptions > 0
    roomy = run(make_engine(), requests)
    assert {k: r.tokens for k, r in results.items()} == {k: r.tokens for k, r in roomy.items()}
