"""What leaves a tier: never what must stay, never more than needed, and what costs least."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st
from loraplex.adapter_store.eviction import (
    HALF_LIFE_S,
    Held,
    Placed,
    Speed,
    place,
    protected,
    used,
    victims,
    worth,
)


@st.composite
def packs(draw: st.DrawFn, max_size: int = 8) -> list[Held]:
    count = draw(st.integers(0, max_size))
    return [
        Held(
            key=f"t-{draw(st.integers(0, 2))}/{n}",
            nbytes=draw(st.integers(1, 100)),
            mark=draw(st.floats(0, 5000)),
            restore_s=draw(st.floats(0.001, 10)),
            fixed=draw(st.booleans()),
        )
        for n in range(count)
    ]


def loss(held: Held) -> float:
    """Seconds that its loss will cost, as far as the past tells."""
    return held.restore_s * 2.0 ** (held.mark / HALF_LIFE_S)


@given(held=packs(), nbytes=st.integers(0, 400))
def test_victims_suffice_and_none_could_be_spared(held: list[Held], nbytes: int) -> None:
    chosen = victims(held, nbytes)
    free = sum(h.nbytes for h in held if not h.fixed)
    if chosen is None:
        assert free < nbytes
        return
    freed = sum(h.nbytes for h in chosen)
    assert freed >= nbytes
    assert len({h.key for h in chosen}) == len(chosen)
    for item in chosen:
        assert not item.fixed
        assert freed - item.nbytes < nbytes


@given(held=packs(), nbytes=st.integers(1, 100))
def test_of_packs_of_one_size_the_least_worth_go(held: list[Held], nbytes: int) -> None:
    held = [Held(h.key, 10, h.mark, h.restore_s, h.fixed) for h in held]
    chosen = victims(held, nbytes)
    if chosen is not None:
        stay = [worth(h) for h in held if not h.fixed and h not in chosen]
        assert all(worth(gone) <= min(stay, default=math.inf) for gone in chosen)


@given(now=st.floats(1e9, 2e9), after=st.lists(st.floats(0, 5000), min_size=1, max_size=20))
def test_a_mark_is_the_count_of_uses_that_halves(now: float, after: list[float]) -> None:
    times = [now + t for t in itertools.accumulate(after)]
    mark = None
    for t in times:
        mark = used(mark, t)
    count = sum(2.0 ** ((t - times[-1]) / HALF_LIFE_S) for t in times)
    assert mark is not None
    assert math.isclose(2.0 ** ((mark - times[-1]) / HALF_LIFE_S), count, rel_tol=1e-3)


def test_a_clock_that_was_set_back_makes_no_pack_immortal() -> None:
    assert used(1e9, 1000.0) < 1000.0 + 21 * HALF_LIFE_S


def test_often_wanted_slow_and_small_packs_stay() -> None:
    plain = Held("a", 100, 1000.0, 1.0)
    for better in (
        Held("b", 100, 1000.0 + HALF_LIFE_S, 1.0),
        Held("c", 100, 1000.0, 2.0),
        Held("d", 50, 1000.0, 1.0),
    ):
        assert math.isclose(worth(better), worth(plain) + 1)


@st.composite
def arenas(draw: st.DrawFn) -> tuple[list[Placed], list[tuple[int, int]], int]:
    at, placed, taken = 0, [], []
    for item in draw(packs(max_size=6)):
        at += draw(st.integers(0, 20))
        if draw(st.integers(0, 4)) == 0:
            taken.append((at, at + item.nbytes))
        else:
            placed.append(Placed(item, at))
        at += item.nbytes
    return placed, taken, at + draw(st.integers(0, 20))


@given(arena=arenas(), nbytes=st.integers(1, 150))
def test_a_place_is_free_after_its_packs_left_and_is_the_cheapest(
    arena: tuple[list[Placed], list[tuple[int, int]], int], nbytes: int
) -> None:
    placed, taken, size = arena

    def leaving(start: int) -> list[Held] | None:
        """By going through all there is; None: something there must stay."""
        stop = start + nbytes
        inside = [p for p in placed if p.start < stop and p.stop > start]
        blocked = any(low < stop and high > start for low, high in taken)
        if stop > size or blocked or any(p.held.fixed for p in inside):
            return None
        return [p.held for p in inside]

    found = place(placed, taken, size, nbytes)
    possible = [chosen for start in range(size) if (chosen := leaving(start)) is not None]
    if found is None:
        assert not possible
        return
    start, gone = found
    expected = leaving(start)
    assert expected is not None
    assert sorted(h.key for h in gone) == sorted(h.key for h in expected)
    least = min(sum(loss(h) for h in chosen) for chosen in possible)
    assert sum(loss(h) for h in gone) <= least * (1 + 1e-6) + 1e-9


@given(held=packs(), bound=st.integers(0, 300))
def test_what_is_kept_is_of_its_tenants_and_within_the_bound(held: list[Held], bound: int) -> None:
    names = {"t-0", "t-1/1"}
    kept = protected(held, names, bound)
    by_key = {h.key: h for h in held}
    assert sum(by_key[k].nbytes for k in kept) <= bound
    assert all(k.startswith("t-0/") or k == "t-1/1" for k in kept)
    left = bound - sum(by_key[k].nbytes for k in kept)
    for item in held:
        if item.key.startswith("t-0/") and item.key not in kept:
            assert item.nbytes > left  # it would have been kept if it fitted


def test_speed_follows_what_large_packs_took() -> None:
    speed = Speed(latency_s=0.5, bytes_per_s=1e6)
    speed.measured(1000, 100.0)  # tells of latency alone
    assert speed.seconds(1_000_000) == 1.5
    for _ in range(50):
        speed.measured(100_000_000, 1.0)
    assert abs(speed.seconds(100_000_000) - 1.5) < 0.01
