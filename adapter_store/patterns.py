"""Regular expressions of uploads, matched in linear time.

rank_pattern, alpha_pattern and target_modules are regular expressions that a tenant writes, and
Python's `re` backtracks: "(a+)+x" would hold the ingest process for good. Here they are parsed by
`re`'s own parser, so that they mean what PEFT takes them for, and run as an automaton whose states
are built on demand (Thompson's construction): one table look-up per character.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from .errors import AdapterRefused
from .quoting import show

MAX_PATTERN_CHARS = 512
MAX_PATTERNS = 64  # that hold more than letters, digits, '_' and '.'
_MAX_STATES = 4000
_MAX_WORK = 1_000_000  # state visits while tables are built, about a second and 50 MB

_ANY = (1 << 128) - 1
_ALL_BUT_NEWLINE = _ANY & ~(1 << ord("\n"))
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")
_BEGIN, _END = "begin", "end"


class PatternError(ValueError):
    """A pattern isn't a regular expression, or uses what isn't supported."""


class Budget:
    """What building the tables of one or more patterns may cost, in visits of states."""

    def __init__(self) -> None:
        self._left = _MAX_WORK

    def spend(self, visits: int) -> None:
        self._left -= visits
        if self._left < 0:
            raise AdapterRefused(
                "bad_config",
                "adapter_config.json: its patterns take too long to match; write simpler ones",
            )


class Pattern:
    """One regular expression over ASCII text, without flags, look-around or back-references.

    Matching raises AdapterRefused when the budget is spent, which no sensible pattern comes near.
    """

    def __init__(self, text: str, budget: Budget | None = None) -> None:
        """Raises: PatternError."""
        self._budget = budget or Budget()
        if len(text) > MAX_PATTERN_CHARS:
            raise PatternError(f"has {len(text)} characters, at most {MAX_PATTERN_CHARS} are read")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree: Any = parser.parse(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternError(f"isn't a regular expression: {error}") from None
        if tree.state.flags & ~re.UNICODE:
            raise PatternError("uses inline flags, which aren't supported")
        # Per state: (mask of characters, next state), and empty moves (assertion or None, next).
        self._moves: list[tuple[int, int] | None] = []
        self._empty: list[list[tuple[str | None, int]]] = []
        start, self._accept = self._sequence(tree)
        self._tables: dict[frozenset[int], dict[str, frozenset[int]]] = {}
        self._ends: dict[frozenset[int], bool] = {}
        self._start = self._close({start}, {_BEGIN})
        self._start_is_end = self._accept in self._close({start}, {_BEGIN, _END})

    def fullmatch(self, text: str) -> bool:
        """As `re.fullmatch(pattern, text) is not None`."""
        states = self._start
        for char in text:
            states = self._step(states, char)
        return self._accepts(states, text)

    def match(self, text: str) -> bool:
        """As `re.match(pattern, text) is not None`."""
        states = self._start
        for char in text:
            if self._accept in states:
                return True
            states = self._step(states, char)
        return self._accepts(states, text)

    def _accepts(self, states: frozenset[int], text: str) -> bool:
        if not text:
            return self._start_is_end
        found = self._ends.get(states)
        if found is None:
            found = self._ends[states] = self._accept in self._close(states, {_END})
        return found

    def _step(self, states: frozenset[int], char: str) -> frozenset[int]:
        table = self._tables.setdefault(states, {})
        found = table.get(char)
        if found is None:
            self._budget.spend(len(states))
            bit = 1 << ord(char)
            moves = (self._moves[state] for state in states)
            found = self._close({move[1] for move in moves if move and move[0] & bit}, set())
            table[char] = found
        return found

    def _close(self, states: Iterable[int], holding: set[str]) -> frozenset[int]:
        """All states reachable by empty moves whose assertion, if any, is in `holding`."""
        seen = set(states)
        todo = list(seen)
        while todo:
            for assertion, state in self._empty[todo.pop()]:
                if state not in seen and (assertion is None or assertion in holding):
                    seen.add(state)
                    todo.append(state)
        self._budget.spend(len(seen))
        return frozenset(seen)

    def _state(self) -> int:
        if len(self._moves) >= _MAX_STATES:
            raise PatternError("is too large: its repeats multiply")
        self._moves.append(None)
        self._empty.append([])
        return len(self._moves) - 1

    def _sequence(self, items: Any) -> tuple[int, int]:
        first = last = self._state()
        for kind, value in items:
            start, end = self._item(kind, value)
            self._empty[last].append((None, start))
            last = end
        return first, last

    def _item(self, kind: Any, value: Any) -> tuple[int, int]:
        if kind in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            return self._character(_mask(kind, value))
        if kind is op.SUBPATTERN:
            _, added, removed, items = value
            if added or removed:
                raise PatternError("uses inline flags, which aren't supported")
            return self._sequence(items)
        if kind is op.BRANCH:
            return self._branch([self._sequence(items) for items in value[1]])
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            return self._repeat(*value)
        if kind is op.AT and value in _ASSERTIONS:
            start, end = self._state(), self._state()
            self._empty[start].append((_ASSERTIONS[value], end))
            return start, end
        raise PatternError(f"uses {str(kind).lower()}, which isn't supported")

    def _character(self, mask: int) -> tuple[int, int]:
        start, end = self._state(), self._state()
        self._moves[start] = (mask, end)
        return start, end

    def _branch(self, parts: list[tuple[int, int]]) -> tuple[int, int]:
        start, end = self._state(), self._state()
        for first, last in parts:
            self._empty[start].append((None, first))
            self._empty[last].append((None, end))
        return start, end

    def _repeat(self, low: int, high: Any, items: Any) -> tuple[int, int]:
        first = last = self._state()
        for _ in range(int(low)):
            start, end = self._sequence(items)
            self._empty[last].append((None, start))
            last = end
        out = self._state()
        self._empty[last].append((None, out))
        if high is op.MAXREPEAT:
            start, end = self._sequence(items)
            self._empty[last].append((None, start))
            self._empty[end].append((None, last))
            return first, out
        for _ in range(int(high) - int(low)):
            start, end = self._sequence(items)
            self._empty[last].append((None, start))
            self._empty[end].append((None, out))
            last = end
        return first, out


_ASSERTIONS = {
    op.AT_BEGINNING: _BEGIN,
    op.AT_BEGINNING_STRING: _BEGIN,
    op.AT_END: _END,
    op.AT_END_STRING: _END,
}
_CATEGORIES = {
    op.CATEGORY_DIGIT: r"\d",
    op.CATEGORY_NOT_DIGIT: r"\D",
    op.CATEGORY_SPACE: r"\s",
    op.CATEGORY_NOT_SPACE: r"\S",
    op.CATEGORY_WORD: r"\w",
    op.CATEGORY_NOT_WORD: r"\W",
}
_CATEGORY_MASKS = {
    category: sum(1 << code for code in range(128) if re.match(text, chr(code)))
    for category, text in _CATEGORIES.items()
}


def _mask(kind: Any, value: Any) -> int:
    """The ASCII characters that one item of a pattern stands for, as bits."""
    if kind is op.ANY:
        return _ALL_BUT_NEWLINE
    if kind is op.LITERAL:
        return 1 << value & _ANY if value < 128 else 0
    if kind is op.NOT_LITERAL:
        return _ANY & ~_mask(op.LITERAL, value)
    if kind is op.RANGE:
        low, high = value
        return sum(1 << code for code in range(low, min(high, 127) + 1))
    if kind is op.CATEGORY:
        return _CATEGORY_MASKS[value]
    mask, negate = 0, False
    for inner, inner_value in value:
        if inner is op.NEGATE:
            negate = True
        else:
            mask |= _mask(inner, inner_value)
    return _ANY & ~mask if negate else mask


class PatternTable:
    """PEFT's rank_pattern or alpha_pattern: the first pattern that fits a module's name wins.

    A pattern p fits a name when `re.match(rf"(.*\\.)?({p})$", name)` does (PEFT's
    `get_pattern_key`). Tools write one plain name per module, thousands of them: those are looked
    up by their shape instead of tried one by one.
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        """Raises: PatternError, its message beginning with the pattern."""
        self._values = list(values.values())
        self._plain: dict[tuple[int, tuple[int, ...]], dict[str, int]] = {}
        self._general: list[tuple[int, Pattern]] = []
        budget = Budget()
        for order, text in enumerate(values):
            if _PLAIN.fullmatch(text):
                dots = tuple(i for i, char in enumerate(text) if char == ".")
                self._plain.setdefault((len(text), dots), {}).setdefault(text, order)
                continue
            if len(self._general) == MAX_PATTERNS:
                raise PatternError(f"{show(text)} is one of more than {MAX_PATTERNS}")
            try:
                self._general.append((order, Pattern(rf"(.*\.)?({text})$", budget)))
            except PatternError as error:
                raise PatternError(f"{show(text)} {error}") from None

    def get(self, name: str, default: float) -> float:
        """The value of the first pattern that fits `name`."""
        orders = [order for order, pattern in self._general if pattern.match(name)]
        for (length, dots), group in self._plain.items():
            at = len(name) - length
            if at < 0 or (at > 0 and name[at - 1] != "."):
                continue
            masked = list(name[at:])
            for dot in dots:  # a dot of the pattern fits any character
                masked[dot] = "."
            if (order := group.get("".join(masked))) is not None:
                orders.append(order)
        return self._values[min(orders)] if orders else default
