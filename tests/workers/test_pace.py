"""The expected wait, from steps whose times are known."""

import pytest
from loraplex.workers import Pace


def test_nothing_is_expected_before_anything_was_seen():
    assert Pace().wait_s(1000, 5, 0) == 0.0


def test_prompt_tokens_cost_what_they_added_to_steps():
    pace = Pace()
    for _ in range(50):
        pace.stepped(0.010, 0, 0)
        pace.stepped(0.030, 100, 0)
    assert pace.step_s == pytest.approx(0.010)
    assert pace.token_s == pytest.approx(0.0002)
    assert pace.wait_s(500, 0, 4) == pytest.approx(0.010 + 0.1)


def test_a_full_engine_waits_for_ends():
    pace = Pace()
    for _ in range(100):
        for ended in (0, 0, 0, 2):  # two ends in 40 ms
            pace.stepped(0.010, 0, ended)
    assert pace.end_s == pytest.approx(0.020)
    assert pace.wait_s(0, 3, 4) == pytest.approx(0.010)
    assert pace.wait_s(0, 4, 4) == pytest.approx(0.010 + 0.020)
    assert pace.wait_s(0, 9, 0) == pytest.approx(0.010 + 10 * 0.020)


def test_time_without_an_end_counts_for_how_often_requests_end():
    pace = Pace()
    for _ in range(50):
        pace.stepped(0.010, 0, 1)
    assert pace.ends_every_s == pytest.approx(0.010)
    for _ in range(100):
        pace.stepped(0.010, 0, 0)
    assert pace.ends_every_s == pytest.approx(1.0)
    pace.stepped(0.010, 0, 1)
    assert pace.ends_every_s == pace.end_s
