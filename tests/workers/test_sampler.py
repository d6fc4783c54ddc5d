"""Sampling draws from the right distribution, by seed and position alone."""

from __future__ import annotations

import random

import pytest
import torch
from loraplex.workers import SamplingParams
from loraplex.workers.sampler import Draw, sample, token_logprobs, uniform


def allowed(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The filtered distribution of one row, by the definition of top-k and top-p."""
    probs = torch.softmax(logits.double() / params.temperature, -1)
    order = sorted(range(len(probs)), key=lambda i: -probs[i].item())
    kept, mass = [], 0.0
    for place, i in enumerate(order):
        if (params.top_k and place >= params.top_k) or (mass >= params.top_p and kept):
            break
        kept.append(i)
        mass += probs[i].item()
    out = torch.zeros_like(probs)
    out[kept] = probs[kept]
    return out / out.sum()


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 8, "top_p": 0.5}, {"temperature": 2.0}]
)
def test_frequencies_follow_the_filtered_distribution(filters):
    torch.manual_seed(random.randrange(1 << 30))
    vocab, n = 23, 20000
    row = torch.randn(vocab) * 2
    draws = [
        Draw(SamplingParams(**{"temperature": 0.8, "seed": i, **filters}), i % 7) for i in range(n)
    ]
    tokens = sample(row.repeat(n, 1), draws)
    seen = torch.bincount(tokens, minlength=vocab).double() / n
    expected = allowed(row, draws[0].params)
    assert ((seen > 0) <= (expected > 0)).all()
    # Five standard deviations of a binomial proportion.
    bound = 5 * (expected * (1 - expected) / n).sqrt() + 1e-9
    assert ((seen - expected).abs() <= bound).all()


def test_a_row_draws_the_same_whatever_its_batch():
    vocab = 50
    rows = torch.randn(12, vocab)
    draws = [
        Draw(SamplingParams(temperature=1.0, seed=i, top_p=0.9 if i % 2 else 1.0), i)
        for i in range(12)
    ]
    together = sample(rows.clone(), draws).tolist()
    alone = [sample(rows[i : i + 1].clone(), [draws[i]]).item() for i in range(12)]
    assert together == alone


def test_the_largest_number_still_draws_a_token_of_the_filter(monkeypatch):
    largest = 1 - 2**-53
    monkeypatch.setattr("loraplex.workers.sampler.uniform", lambda seed, position: largest)
    row = torch.arange(40.0)[None]
    assert sample(row.clone(), [Draw(SamplingParams(temperature=1.0, top_k=3), 0)]).item() == 37


def test_greedy_and_banned_ids():
    rows = torch.randn(3, 40)
    best = rows.argmax(-1).tolist()
    draws = [
        Draw(SamplingParams(temperature=0.0), 0, banned=(best[i],) if i else ()) for i in range(3)
    ]
    chosen = sample(rows.clone(), draws).tolist()
    assert chosen[0] == best[0]
    assert chosen[1] == rows[1].topk(2).indices[1]
    assert chosen[2] == rows[2].topk(2).indices[1]


def test_uniform_is_even_and_depends_on_both_arguments():
    values = [uniform(seed, position) for seed in range(60) for position in range(60)]
    assert len(set(values)) == len(values)
    assert all(0 <= v < 1 for v in values)
    assert abs(sum(values) / len(values) - 0.5) < 0.03


def test_logprobs_rank_and_alternatives_match_log_softmax():
    logits = torch.randn(4, 30)
    ids = [3, 0, 29, 7]
    reference = logits.log_softmax(-1)
    for row, entry in enumerate(token_logprobs(logits, ids, [0, 1, 5, 2])):
        assert entry.logprob == pytest.approx(reference[row, ids[row]].item(), abs=1e-6)
        assert entry.rank == (reference[row] > reference[row, ids[row]]).sum().item() + 1
        best = reference[row].topk([0, 1, 5, 2][row])
        assert [t for t, _ in entry.top] == best.indices.tolist()
