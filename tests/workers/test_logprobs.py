"""Log-probabilities are those of log-softmax, on logits as the model made them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from loraplex.workers import SamplingParams
from loraplex.workers.sampling.logprobs import token_logprobs
from loraplex.workers.sampling.sampler import Draw, SamplingBatch, sample


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


def prompt_logprobs(results) -> dict[str, list]:
    """What each request was told of its prompt; it is told once."""
    told = {}
    for name, result in results.items():
        found = [o.prompt_logprobs for o in result.outputs if o.prompt_logprobs is not None]
        assert len(found) == 1
        assert result.outputs[0].prompt_logprobs is found[0]
        told[name] = found[0]
    return told


def same(a, b) -> None:
    for name, entries in a.items():
        assert len(entries) == len(b[name])
        assert entries[0] is b[name][0] is None
        for mine, theirs in zip(entries[1:], b[name][1:], strict=True):
            assert mine.token_id == theirs.token_id
            assert abs(mine.rank - theirs.rank) <= 5  # other chunks round differently
            assert [mine.logprob, *(p for _, p in mine.top)] == pytest.approx(
                [theirs.logprob, *(p for _, p in theirs.top)], abs=1e-3
            )


def test_prompt_logprobs_are_the_same_in_chunks_and_after_preemption(make_engine, run, greedy):
    requests = [
        greedy(str(i), torch.randint(4, 4096, (90,)).tolist(), prompt_logprobs=i, max_tokens=50)
        for i in range(5)
    ]
    whole = prompt_logprobs(run(make_engine(), requests))
    for request in requests:
        entries = whole[request.request_id]
        assert [e and e.token_id for e in entries] == [None, *request.prompt_ids[1:]]
        assert {len(e.top) for e in entries[1:]} == {request.sampling.prompt_logprobs}
    same(prompt_logprobs(run(make_engine(max_batch_tokens=17), requests)), whole)
    tight = make_engine(max_batch_tokens=6, kv_tokens=352)
    cut_short = 0
    for request in requests:
        tight.submit(request)
    outputs: dict[str, list] = {}
    while tight.has_work():
        for out in tight.step():
            outputs.setdefault(out.request_id, []).append(out)
        # Positions whose logprobs are known, but which have to be computed again.
        open_ = [*tight._scheduler.waiting, *tight._scheduler.running]
        cut_short += any(s.computed + 1 < len(s.prompt_logprobs or ()) for s in open_)
    assert cut_short, "no prompt was preempted half-way"
    results = {k: SimpleNamespace(outputs=v) for k, v in outputs.items()}
    same(prompt_logprobs(results), whole)
