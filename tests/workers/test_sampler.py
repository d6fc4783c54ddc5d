"""Sampling draws from the right distribution, by seed and position alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from loraplex.workers import SamplingParams
from loraplex.workers.sampling.penalties import TokenCounts
from loraplex.workers.sampling.sampler import Draw, Sample, SamplingBatch, sample
from loraplex.workers.sampling.sampling_batch import uniforms


def take(logits: torch.Tensor, draws: list[Draw]) -> Sample:
    batch = SamplingBatch.build(draws, logits.shape[1], logits.device)
    return sample(logits.clone(), batch).to_host()


def edited(logits: torch.Tensor, draws: list[Draw]) -> np.ndarray:
    """What sampling makes of the logits before it draws."""
    logits = logits.clone()
    sample(logits, SamplingBatch.build(draws, logits.shape[1], logits.device))
    return logits.numpy()


def uniform(seed: int, position: int) -> float:
    """splitmix64's finaliser over (seed, position), in integers of any size."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


def edit_one(row: np.ndarray, draw: Draw, prompt: list[int], output: list[int]) -> np.ndarray:
    """Bias, penalties and bans of one row, token by token."""
    params, row = draw.params, row.astype(np.float64)
    for token, value in params.logit_bias:
        row[token] += value
    for token in range(len(row)):
        if token in prompt or token in output:
            if row[token] > 0:
                row[token] /= params.repetition_penalty
            else:
                row[token] *= params.repetition_penalty
        row[token] -= params.frequency_penalty * output.count(token)
        row[token] -= params.presence_penalty * (token in output)
    for token in draw.banned:
        row[token] = -np.inf
    return row


def distribution(row: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The filtered distribution of one row, by the definitions of min-p, top-k and top-p."""
    if params.temperature == 0 or params.top_k == 1:
        return np.eye(len(row))[row.argmax()]
    probs = np.exp((row - row.max()) / params.temperature)
    probs[probs < params.min_p * probs.max()] = 0
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    if params.top_k:
        probs[order[params.top_k :]] = 0
    probs /= probs.sum()
    mass = 0.0
    for place, i in enumerate(order):
        if place and mass >= params.top_p:
            probs[i] = 0
        else:
            mass += probs[i]
    return probs / probs.sum()


FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"top_k": 8, "top_p": 0.5},
    {"top_k": 9, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 2.0},
    {"top_k": 1},
]


@pytest.mark.parametrize("filters", FILTERS)
def test_frequencies_follow_the_filtered_distribution(filters):
    vocab, n = 23, 20000
    row = torch.randn(vocab) * 2
    draws = [
        Draw(SamplingParams(**{"temperature": 0.8, "seed": i, **filters}), i % 7) for i in range(n)
    ]
    seen = np.bincount(take(row.repeat(n, 1), draws).tokens, minlength=vocab) / n
    expected = distribution(row.double().numpy(), draws[0].params)
    assert ((seen > 0) <= (expected > 0)).all()
    # Five standard deviations of a binomial proportion.
    bound = 5 * np.sqrt(expected * (1 - expected) / n) + 1e-9
    assert (abs(seen - expected) <= bound).all()


def random_params(rng: random.Random, vocab: int) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7]),
        top_k=rng.choice([0, 0, 1, 3, 40, 256, 300, vocab, 10 * vocab]),
        top_p=rng.choice([1.0, 1.0, 0.2, 0.95, 1e-6]),
        min_p=rng.choice([0.0, 0.0, 0.02, 0.5, 1.0]),
        repetition_penalty=rng.choice([1.0, 1.3, 0.7]),
        presence_penalty=rng.choice([0.0, 1.1, -0.4]),
        frequency_penalty=rng.choice([0.0, 0.6, -2.0]),
        logit_bias=tuple(
            (t, rng.uniform(-9, 9)) for t in rng.sample(range(vocab), rng.choice([0, 0, 1, 6]))
        ),
        seed=rng.getrandbits(63),
        logprobs=rng.choice([None, 0, 3]),
    )


def random_draws(
    rng: random.Random, n: int, vocab: int
) -> tuple[list[Draw], list[tuple[list[int], list[int]]]]:
    """Rows that ask for anything, and each row's prompt and output."""
    draws, texts = [], []
    for _ in range(n):
        params = random_params(rng, vocab)
        prompt = rng.choices(range(vocab), k=rng.randrange(1, 30))
        output = rng.choices([*prompt, *range(vocab)], k=rng.randrange(40))
        counts = None
        if params.penalised:
            seen = prompt if params.repetition_penalty != 1 else []
            split = rng.randrange(len(output) + 1)
            counts = TokenCounts(seen, output[:split])
            for token in output[split:]:
                counts.add(token)
        banned = tuple(rng.sample(range(vocab), rng.choice([0, 0, 2])))
        draws.append(Draw(params, rng.randrange(1 << 20), banned, counts))
        texts.append((prompt, output))
    return draws, texts


@pytest.mark.parametrize("vocab", [37, 1024, 2500])
def test_any_row_is_drawn_as_by_definition(vocab):
    """The token of each row is the one whose share of [0, 1) holds the row's uniform number."""
    rng = random.Random()
    n = 60
    logits = torch.randn(n, vocab) * 3
    draws, texts = random_draws(rng, n, vocab)
    tokens = take(logits, draws).tokens
    changed = edited(logits, draws)
    for i, draw in enumerate(draws):
        row = edit_one(logits[i].numpy(), draw, *texts[i])
        np.testing.assert_allclose(changed[i], row, rtol=1e-5, atol=1e-5)
        probs = distribution(row, draw.params)
        ends = probs.cumsum()
        u = uniform(draw.params.seed, draw.position)
        assert probs[tokens[i]] > 0, draw
        if not draw.greedy:
            assert ends[tokens[i]] - probs[tokens[i]] - 1e-5 <= u < ends[tokens[i]] + 1e-5, draw


def test_a_row_draws_the_same_whatever_its_batch():
    rng = random.Random()
    vocab, n = 1500, 40
    logits = torch.randn(n, vocab)
    draws, _ = random_draws(rng, n, vocab)
    together = take(logits, draws)
    for _ in range(30):
        rows = rng.sample(range(n), rng.choice([1, 2, 7]))
        some = take(logits[rows], [draws[i] for i in rows])
        assert some.tokens == [together.tokens[i] for i in rows]
        for j, i in enumerate(rows):
            mine, theirs = some.logprobs[j], together.logprobs[i]
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                assert (mine.token_id, mine.rank, mine.top) == (
                    theirs.token_id,
                    theirs.rank,
                    theirs.top,
                )


def test_shown_alternatives_of_equal_logits_dont_depend_on_the_neighbours():
    row = torch.zeros(1, 300)
    row[0, 200:] = -1.0
    few = Draw(SamplingParams(temperature=0, logprobs=2), 0)
    many = Draw(SamplingParams(temperature=0, logprobs=19), 0)
    shown = take(row.repeat(2, 1), [few, many]).logprobs
    assert [[t for t, _ in s.top] for s in shown if s] == [[0, 1], list(range(19))]


def test_equal_logits_at_the_border_of_top_k_all_stay():
    row = torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0, -1.0])
    draws = [Draw(SamplingParams(top_k=2, seed=i), 0) for i in range(300)]
    assert set(take(row.repeat(300, 1), draws).tokens) == {1, 2, 3, 4}


def test_the_largest_number_still_draws_a_token_of_the_filter(monkeypatch):
    largest = np.array([1 - 2**-53])
    monkeypatch.setattr(
        "loraplex.workers.sampling.sampling_batch.uniforms", lambda seeds, positions: largest
    )
    row = torch.arange(40.0)[None]
    assert take(row, [Draw(SamplingParams(top_k=3), 0)]).tokens == [39]
    assert take(-row, [Draw(SamplingParams(top_k=3), 0)]).tokens == [2]


def test_greedy_and_banned_ids():
    rows = torch.randn(3, 40)
    best = rows.argmax(-1).tolist()
    draws = [
        Draw(SamplingParams(temperature=0.0), 0, banned=(best[i], 40, 99) if i else ())
        for i in range(3)
    ]
    chosen = take(rows, draws).tokens
    assert chosen[0] == best[0]
    assert chosen[1] == rows[1].topk(2).indices[1]
    assert chosen[2] == rows[2].topk(2).indices[1]


def test_rows_that_arent_finite_are_told_and_harm_nobody():
    rows = torch.randn(5, 50)
    rows[1, 3], rows[2, 0], rows[3] = float("nan"), float("inf"), float("-inf")
    draws = [
        Draw(SamplingParams(temperature=float(i % 2), top_p=0.9, seed=i, logprobs=1), 0)
        for i in range(5)
    ]
    for all_random in (False, True):
        if all_random:
            draws = [Draw(SamplingParams(top_k=4, seed=i), 0) for i in range(5)]
        chosen = take(rows, draws)
        assert chosen.finite == [True, False, False, False, True]
        assert all(0 <= t < 50 for t in chosen.tokens)
        assert chosen.tokens[4] == take(rows[4:], draws[4:]).tokens[0]


def test_uniform_numbers_are_those_of_the_definition_and_even():
    seeds = [random.getrandbits(63) for _ in range(1000)]
    positions = [random.randrange(1 << 20) for _ in range(1000)]
    values = uniforms(seeds, positions)
    assert values.tolist() == [uniform(s, p) for s, p in zip(seeds, positions, strict=True)]
    grid = uniforms([s for s in range(60) for _ in range(60)], [*range(60)] * 60)
    assert len(set(grid.tolist())) == len(grid)
    assert grid.min() >= 0
    assert grid.max() < 1
    assert abs(grid.mean() - 0.5) < 0.03


def test_logit_bias_forces_and_forbids():
    rows = torch.randn(2, 40)
    best = rows[1].argmax().item()
    forced = Draw(SamplingParams(logit_bias=((7, 100.0), (41, 5.0)), seed=1), 0)
    forbidden = Draw(SamplingParams(temperature=0, logit_bias=((int(best), -100.0),)), 0)
    chosen = take(rows, [forced, forbidden]).tokens
    assert chosen == [7, rows[1].topk(2).indices[1]]
