"""A prompt starts before its adapter has come only where no layer would be waited for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from loraplex.workers.pool.early_start import Speeds, stays_ahead

LAYERS = [(n, 35_000_000) for n in range(12)]  # 0.7 ms each at 50 GB/s


def test_a_long_prompt_may_start_and_a_short_one_waits():
    assert stays_ahead(LAYERS, 50e9, 1.3e-3)
    assert not stays_ahead(LAYERS, 50e9, 0.5e-3)
    assert not stays_ahead(LAYERS, 50e9, 0.72e-3)  # the copy may be a little slower than measured
    assert stays_ahead(LAYERS, 50e9, 0.5e-3, elapsed_s=6e-3)


def test_what_isnt_adapted_gives_the_copy_time():
    assert stays_ahead([(0, 10), (5, 50)], 1.0 * 1.1, 10.0)
    assert not stays_ahead([(0, 10), (1, 50)], 1.0 * 1.1, 10.0)


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 100)), min_size=1, max_size=9),
    st.floats(0.1, 10),
    st.floats(0.1, 10),
    st.floats(0, 50),
)
def test_as_playing_it_through_says(steps, bytes_s, layer_s, elapsed):
    layers, index = [], -1
    for step, nbytes in steps:
        index += step
        layers.append((index, nbytes))
    arrivals, at = {}, -elapsed
    for n, nbytes in layers:
        at += 1.1 * nbytes / bytes_s
        arrivals[n] = at
    # Compute reaches the first adapted layer when that has come, and must not be held up again.
    first = layers[0][0]
    clock = max(arrivals[first], 0.0)
    waits = 0.0
    for n in range(first, index + 1):
        waits = max(waits, arrivals.get(n, clock) - clock)
        clock += layer_s
    if abs(waits) > 1e-6 or waits == 0:
        assert stays_ahead(layers, bytes_s, layer_s, elapsed) == (waits <= 1e-6)


def test_nothing_starts_early_before_both_speeds_are_known():
    speeds = Speeds()
    speeds.loaded(420_000_000, 0.0084)
    assert not speeds.may_start(LAYERS, 2048, 12, 0.0)
    speeds.prefilled(8, 1e-3)  # too short to say anything
    assert not speeds.may_start(LAYERS, 2048, 12, 0.0)
    speeds.prefilled(2048, 16e-3)
    assert speeds.may_start(LAYERS, 2048, 12, 0.0)
    assert not speeds.may_start(LAYERS, 128, 12, 0.0)
    assert not speeds.may_start([], 2048, 12, 0.0)
    for _ in range(20):
        speeds.loaded(420_000_000, 0.1)  # the copies have become slow
    assert not speeds.may_start(LAYERS, 2048, 12, 0.0)
