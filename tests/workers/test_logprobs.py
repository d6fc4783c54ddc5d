"""Log-probabilities are those of log-softmax, on logits as the model made them."""

from __future__ import annotations

import pytest
import torch
from loraplex.workers import SamplingParams
from loraplex.workers.logprobs import token_logprobs
from loraplex.workers.sampler import Draw, SamplingBatch, sample


def expect(entry, row: torch.Tensor, token: int, top: int) -> None:
    reference = row.double().log_softmax(-1)
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(reference[token].item(), abs=1e-5)
    assert entry.rank == (reference > reference[token]).sum().item() + 1
    best = reference.topk(top)
    assert [t for t, _ in entry.top] == best.indices.tolist()
    assert [p for _, p in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("n", [1, 4, 300])
def test_logprobs_rank_and_alternatives_match_log_softmax(n):
    logits = torch.randn(n, 50) * 4
    ids = torch.randint(50, (n,)).tolist()
    top = torch.randint(6, (n,)).tolist()
    for row, entry in enumerate(token_logprobs(logits, ids, top)):
        expect(entry, logits[row], ids[row], top[row])


def test_a_draw_shows_what_the_model_said_before_anything_changed_it():
    logits = torch.randn(5, 30)
    draws = [
        Draw(
            SamplingParams(
                seed=i,
                temperature=0.5,
                top_k=3,
                logit_bias=((i, 3.0),),
                logprobs=None if i == 2 else i,
            ),
            i,
            banned=(int(logits[i].argmax()),),
        )
        for i in range(5)
    ]
    chosen = sample(logits.clone(), SamplingBatch.build(draws, 30, logits.device)).to_host()
    assert chosen.logprobs[2] is None
    for i in (0, 1, 3, 4):
        expect(chosen.logprobs[i], logits[i], chosen.tokens[i], i)
