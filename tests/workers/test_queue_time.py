"""Waiting is booked under what was lacked, all of it and nothing twice."""

from __future__ import annotations

import random

import pytest
from loraplex.workers.queue_time import SAMPLE_S, QueueTime, cause_of
from loraplex.workers.request import AdapterRef, GenerationRequest, SamplingParams
from loraplex.workers.request_times import RequestTimes
from loraplex.workers.sequence import Sequence

CAUSES = ("adapter", "pool", "kv", "batch")


def sequence(accepted_s: float, tier: str | None = None) -> Sequence:
    ref = AdapterRef("t", "ab" * 32)
    request = GenerationRequest("r", (1, 2, 3), SamplingParams(), "t", ref)
    return Sequence(request, 0, 100, tier=tier, times=RequestTimes(accepted_s=accepted_s))


def test_the_first_thing_that_is_missing_is_the_cause():
    assert cause_of(resident=False, loading=True, needed_blocks=9, free_blocks=0) == "adapter"
    assert cause_of(resident=False, loading=False, needed_blocks=9, free_blocks=0) == "pool"
    assert cause_of(resident=True, loading=False, needed_blocks=9, free_blocks=8) == "kv"
    assert cause_of(resident=True, loading=False, needed_blocks=8, free_blocks=8) == "batch"


@pytest.mark.parametrize("seed", range(5))
def test_all_waiting_is_booked_once_under_its_cause(seed):
    rng = random.Random(seed)
    queue, now, waiting = QueueTime(), 100.0, []
    expected = dict.fromkeys(CAUSES, 0.0)
    why: dict[Sequence, str] = {}
    for _ in range(400):
        now += SAMPLE_S * rng.uniform(0.2, 2.0)
        if queue.due(now):
            for seq in waiting:
                why[seq] = rng.choice(CAUSES)
                expected[why[seq]] += now - seq.times.counted_s
            queue.sample(now, waiting, lambda seq: why[seq])
        if waiting and rng.random() < 0.4:
            seq = waiting.pop(rng.randrange(len(waiting)))
            expected[why.get(seq, "batch")] += now - seq.times.counted_s
            queue.admitted(now, seq)
            assert seq.times.admitted_s == now
            assert seq.times.in_batch
            spans = seq.times.spans(now)
            assert spans["queue"] + spans["load"] == pytest.approx(now - seq.times.accepted_s)
        elif rng.random() < 0.5:
            waiting.append(sequence(now))
    assert queue.seconds == pytest.approx(expected)


def test_a_preempted_request_waits_again_but_its_running_is_no_waiting():
    queue, seq = QueueTime(), sequence(10.0)
    queue.admitted(11.0, seq)
    assert queue.seconds["batch"] == 1.0
    queue.sample(50.0, [seq], lambda _: "kv")  # seen in the queue: it was preempted
    queue.sample(50.5, [seq], lambda _: "kv")
    queue.admitted(51.0, seq)
    assert queue.seconds["batch"] == 1.0
    assert queue.seconds["kv"] == 1.0
    assert seq.times.admitted_s == 11.0


def test_a_load_too_short_to_be_seen_is_told_by_its_tier():
    queue, seq = QueueTime(), sequence(1.0, tier="disk")
    queue.admitted(1.01, seq)
    assert queue.seconds["adapter"] == pytest.approx(0.01)


def test_spans_follow_each_other_and_make_up_the_whole():
    times = RequestTimes(accepted_s=5.0, load_s=2.0, admitted_s=8.0, first_token_s=9.0)
    assert times.spans(12.0) == {"queue": 1.0, "load": 2.0, "prefill": 1.0, "decode": 3.0}
    assert RequestTimes(accepted_s=5.0).spans(6.0) == {"queue": 1.0, "load": 0.0}
