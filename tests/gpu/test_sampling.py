"""Sampling on a GPU draws what it draws on a CPU, and never makes the host wait."""

from __future__ import annotations

import random

import pytest
import torch
from loraplex.kernels import least_kept
from loraplex.workers import SamplingParams
from loraplex.workers.sampling.penalties import TokenCounts
from loraplex.workers.sampling.sampler import Draw, SamplingBatch, sample

from ..kernels.cuts import check, random_rows
from .layers import NEEDS_GPU

pytestmark = NEEDS_GPU
GPU = torch.device("cuda")


def random_draws(n: int, vocab: int) -> list[Draw]:
    rng = random.Random()
    draws = []
    for _ in range(n):
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_k=rng.choice([0, 1, 20, 2000]),
            top_p=rng.choice([1.0, 0.3, 0.95]),
            min_p=rng.choice([0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            frequency_penalty=rng.choice([0.0, 0.5]),
            logit_bias=tuple((t, 2.0) for t in rng.sample(range(vocab), rng.choice([0, 3]))),
            seed=rng.getrandbits(63),
            logprobs=rng.choice([None, 0, 5]),
        )
        counts = None
        if params.penalised:
            counts = TokenCounts(rng.choices(range(vocab), k=50), rng.choices(range(vocab), k=50))
        draws.append(Draw(params, rng.randrange(9999), banned=(3, 7), counts=counts))
    return draws


@pytest.mark.parametrize("vocab", [300, 4096, 151936, 151937])
def test_rows_are_cut_by_definition(vocab):
    logits, top_k, top_p = random_rows(64, vocab)
    least = least_kept(logits.to(GPU), top_k.to(GPU), top_p.to(GPU))
    check(logits, top_k, top_p, least.cpu())


@pytest.mark.parametrize(("n", "vocab"), [(1, 300), (64, 4096), (48, 151936), (130, 32001)])
def test_draws_are_those_of_a_cpu(n, vocab):
    logits, draws = torch.randn(n, vocab) * 3, random_draws(n, vocab)
    expected = sample(
        logits.clone(), SamplingBatch.build(draws, vocab, torch.device("cpu"))
    ).to_host()
    got = sample(logits.to(GPU), SamplingBatch.build(draws, vocab, GPU)).to_host()
    assert got.finite == expected.finite
    # exp rounds otherwise: a number that falls on the border of two tokens may take the other.
    differ = [i for i in range(n) if got.tokens[i] != expected.tokens[i]]
    assert len(differ) <= 1 + n // 50
    for i in set(range(n)) - set(differ):
        mine, theirs = got.logprobs[i], expected.logprobs[i]
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [t for t, _ in mine.top] == [t for t, _ in theirs.top]


def test_a_row_draws_the_same_alone_to_the_bit():
    n, vocab = 40, 151936
    logits, draws = (torch.randn(n, vocab) * 3).to(GPU), random_draws(n, vocab)
    together = sample(logits.clone(), SamplingBatch.build(draws, vocab, GPU)).to_host().tokens
    for i in range(n):
        one = SamplingBatch.build([draws[i]], vocab, GPU)
        assert sample(logits[i : i + 1].clone(), one).to_host().tokens == [together[i]]


def test_nothing_waits_before_the_result_is_asked_for():
    n, vocab = 16, 4096
    draws = random_draws(n, vocab)
    logits = torch.randn(2, n, vocab, device=GPU)
    sample(logits[0], SamplingBatch.build(draws, vocab, GPU)).to_host()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = sample(logits[1], SamplingBatch.build(draws, vocab, GPU)).fetch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(pending.wait().tokens) == n
