"""Hangs and what only looks like one, by an injected clock."""

from __future__ import annotations

import random
from dataclasses import dataclass

from loraplex.workers.rank_watch import BEAT_EVERY_S, WATCH_EVERY_S, RankWatch

BEAT_S, STEP_S = 3.0, 30.0


@dataclass
class Times:
    heard: float = 0.0
    progressed: float = 0.0


def watch_until(
    end: float, *, stops=(), stuck=float("inf"), held_up=()
) -> tuple[float, str] | None:
    """Two ranks from 0 to `end`; when and what the watch says, if anything.

    Args:
        stops: (rank, time) from which its process sends nothing.
        stuck: from here on rank 0's loop doesn't turn.
        held_up: (from, to) of the front's own process; what came is read after its next look.
    """
    watch = RankWatch(BEAT_S, STEP_S)
    ranks = {0: Times(), 1: Times()}
    stop_of = dict(stops)
    now = 0.0
    while now < end:
        now += WATCH_EVERY_S
        for low, high in held_up:
            if low <= now < high:
                now = high
                break
        else:
            for rank, times in ranks.items():
                sent = min(now, stop_of.get(rank, now))
                times.heard = sent - random.uniform(0, BEAT_EVERY_S)
                times.progressed = min(times.heard, stuck)
        wrong = watch.look(now, ranks)
        if wrong is not None:
            return now, wrong
    return None


def test_a_process_that_stops_is_seen_within_five_seconds():
    for rank in (0, 1):
        at = random.uniform(5, 200)
        seen = watch_until(300, stops=[(rank, at)])
        assert seen is not None
        assert f"rank {rank} has sent nothing" in seen[1]
        assert at + BEAT_S - BEAT_EVERY_S <= seen[0] <= at + 5


def test_a_step_that_doesnt_end_is_seen_after_its_time():
    at = random.uniform(5, 200)
    seen = watch_until(300, stuck=at)
    assert seen is not None
    assert "rank 0 has been in one step" in seen[1]
    assert at + STEP_S <= seen[0] <= at + STEP_S + 2


def test_a_group_at_work_or_idle_is_left_alone_also_by_a_front_that_was_held_up():
    assert watch_until(1000, held_up=[(10, 60), (70, 74), (75, 120)]) is None


def test_a_stop_during_the_fronts_own_is_seen_soon_after():
    seen = watch_until(300, stops=[(1, 20)], held_up=[(15, 60)])
    assert seen is not None
    assert 60 + BEAT_S <= seen[0] <= 60 + 5
