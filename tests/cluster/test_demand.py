"""Demand: smoothed tokens/s out of cumulative counters, whatever groups do."""

import pytest
from loraplex.cluster.control.demand import OUTPUT_WEIGHT, DemandTracker
from loraplex.workers import EngineReport

KEY = "tenant/" + "cd" * 32


def report(steps: int, prompt: int = 0, output: int = 0, key: str = KEY) -> EngineReport:
    return EngineReport(steps=steps, prompt_tokens={key: prompt}, output_tokens={key: output})


def run(tracker, group, per_tick, ticks, start=0, dt=0.5, total=0):
    """`per_tick` prompt tokens each `dt` seconds; the first report comes before the first tick."""
    for i in range(ticks):
        total += per_tick
        tracker.observe(group, report(i + start + 1, prompt=total))
        tracker.tick((i + start + 1) * dt)
    return total


def test_a_steady_rate_is_reached_and_held():
    tracker = DemandTracker(tau_s=5.0)
    tracker.observe("a", report(0))
    tracker.tick(0.0)
    run(tracker, "a", per_tick=10, ticks=100)
    assert tracker.rates()[KEY] == pytest.approx(20.0, rel=1e-3)


def test_the_rate_does_not_depend_on_how_often_it_is_folded():
    rates = []
    for dt in (0.1, 0.5, 2.0):
        tracker = DemandTracker(tau_s=4.0)
        tracker.observe("a", report(0))
        tracker.tick(0.0)
        run(tracker, "a", per_tick=int(100 * dt), ticks=round(8 / dt), dt=dt)
        rates.append(tracker.rates()[KEY])
    assert rates == pytest.approx([rates[0]] * 3, rel=1e-9)


def test_generated_tokens_weigh_more_than_prompt_tokens():
    tracker = DemandTracker(tau_s=1.0)
    tracker.observe("a", report(0))
    tracker.tick(0.0)
    tracker.observe("a", report(1, prompt=0, output=100))
    tracker.tick(100.0)
    assert tracker.rates()[KEY] == pytest.approx(OUTPUT_WEIGHT * 1.0)


def test_a_groups_first_report_is_only_a_starting_point():
    tracker = DemandTracker(tau_s=1.0)
    tracker.tick(0.0)
    tracker.observe("a", report(1000, prompt=10**9))
    tracker.tick(0.5)
    assert tracker.rates() == {}


@pytest.mark.parametrize("steps", [3, 5000])
def test_a_restarted_engine_counts_from_zero(steps):
    tracker = DemandTracker(tau_s=1.0)
    tracker.observe("a", report(1000, prompt=10_000))
    tracker.tick(0.0)
    tracker.observe("a", report(steps, prompt=50))
    tracker.tick(1000.0)
    assert tracker.rates()[KEY] == pytest.approx(50 / 1000)


def test_a_restart_is_seen_by_its_steps_when_its_tokens_have_caught_up():
    tracker = DemandTracker(tau_s=1.0)
    tracker.observe("a", report(1000, prompt=100))
    tracker.tick(0.0)
    tracker.observe("a", report(3, prompt=150))
    tracker.tick(100.0)
    assert tracker.rates()[KEY] == pytest.approx(150 / 100)


def test_groups_add_up_and_one_that_leaves_takes_no_demand_with_it():
    tracker = DemandTracker(tau_s=5.0)
    for group in "ab":
        tracker.observe(group, report(0))
    tracker.tick(0.0)
    totals = {"a": 0, "b": 0}
    for i in range(100):
        for group in "ab":
            totals[group] += 5
            tracker.observe(group, report(i + 1, prompt=totals[group]))
        tracker.tick((i + 1) * 0.5)
    before = tracker.rates()[KEY]
    assert before == pytest.approx(20.0, rel=1e-3)
    tracker.forget_group("b")
    assert tracker.rates()[KEY] == before
    tracker.observe("b", report(1, prompt=10**6))
    tracker.tick(50.5)
    assert tracker.rates()[KEY] < before


def test_demand_fades_and_is_forgotten():
    tracker = DemandTracker(tau_s=1.0)
    tracker.observe("a", report(0))
    tracker.tick(0.0)
    tracker.observe("a", report(1, prompt=100))
    tracker.tick(1.0)
    first = tracker.rates()[KEY]
    tracker.tick(2.0)
    assert tracker.rates()[KEY] == pytest.approx(first / 2.718281828)
    tracker.tick(60.0)
    assert tracker.rates() == {}


def test_a_deleted_adapter_is_forgotten_at_once():
    tracker = DemandTracker(tau_s=1.0)
    tracker.observe("a", report(0))
    tracker.tick(0.0)
    tracker.observe("a", report(1, prompt=100))
    tracker.tick(1.0)
    tracker.forget_adapter(KEY)
    assert tracker.rates() == {}


def test_a_clock_that_stands_still_loses_no_work():
    tracker = DemandTracker(tau_s=1.0)
    tracker.observe("a", report(0))
    tracker.tick(1.0)
    tracker.observe("a", report(1, prompt=100))
    tracker.tick(1.0)
    tracker.tick(101.0)
    assert tracker.rates()[KEY] == pytest.approx(1.0)


def test_a_wrong_tau_names_itself():
    with pytest.raises(ValueError, match=r"tau_s is 0.*above 0"):
        DemandTracker(0.0)
