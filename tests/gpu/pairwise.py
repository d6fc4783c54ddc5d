"""A short list of cases in which every two values of every two factors meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

Case = dict[str, int]
Pair = tuple[str, int, str, int]


def pairwise(factors: dict[str, tuple[int, ...]], possible: Callable[[Case], bool]) -> list[Case]:
    """The list, the same at every call. Pairs that are in no `possible` case are left out."""
    open_pairs = {
        (a, x, b, y)
        for a, b in combinations(factors, 2)
        for x in factors[a]
        for y in factors[b]
        if possible({a: x, b: y})
    }
    cases = []
    while open_pairs:
        a, x, b, y = min(open_pairs)
        case = {a: x, b: y}
        for name in factors:
            if name not in case:
                # The value that meets most others for the first time, the least one on a draw.
                case[name] = max(
                    (value for value in factors[name] if possible(case | {name: value})),
                    key=lambda value: (_new(case, name, value, open_pairs), -value),
                )
        case = {name: case[name] for name in factors}
        open_pairs -= set(pairs_of(case))
        cases.append(case)
    return cases


def pairs_of(case: Case) -> Iterator[Pair]:
    for a, b in combinations(case, 2):
        yield a, case[a], b, case[b]


def _new(case: Case, name: str, value: int, open_pairs: set[Pair]) -> int:
    """Open pairs that `value` would make with what the case has. Names come in any order."""
    return sum(
        (other, have, name, value) in open_pairs or (name, value, other, have) in open_pairs
        for other, have in case.items()
    )
