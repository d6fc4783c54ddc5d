"""Bounds on what one grammar may cost others: a gateway's thread, and the steps of an engine.

llguidance counts its work (fuel, states, items), so what is too much is the same everywhere and
at any load. Its defaults allow seconds for a step; the ones here leave honest grammars ten times
what they were seen to need.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from functools import cache

from llguidance import LLParserLimits

from ..errors import GrammarInvalid
from ..request import GrammarKind

# States of the automata for all numbers that must be multiples of another. Nothing in llguidance
# counts these: 100,000 of them take about half a second, ten times as many a minute.
_MAX_MULTIPLE_STATES = 100_000
_ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})")
_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*([-+0-9.eE]+)')


@cache
def limits(kind: GrammarKind) -> LLParserLimits:
    """llguidance's own for a step, since large vocabularies need them, and less for the rest."""
    return LLParserLimits(
        # Also bounds each of the steps that a long forced text takes at once.
        initial_lexer_fuel=100_000,
        # Choices are alternatives of one rule, so they are items of one row.
        max_items_in_row=2000 if kind == "choice" else 1000,
        max_grammar_size=100_000,
        max_lexer_states=50_000,
        verbose_errors=False,
    )


def check_multiples(text: str) -> None:
    """Bounds `multipleOf` in JSON schemas, on their own or within Lark.

    An automaton has a state for each remainder. Schemas that apply together need one for their
    divisors' least common multiple; powers of ten cost nothing.

    Raises:
        GrammarInvalid: the divisors are too large, or too many.
    """
    plain = _ESCAPED.sub(lambda found: chr(int(found[1], 16)), text)
    divisors = [_digits(found) for found in _MULTIPLE.findall(plain)]
    states = 1
    for divisor in divisors:
        states = math.lcm(states, divisor)
        if states * len(divisors) > _MAX_MULTIPLE_STATES:
            raise GrammarInvalid(
                f"multipleOf is given {len(divisors)} times, with a least common multiple of "
                f"{states} or more; at most {_MAX_MULTIPLE_STATES // len(divisors)} is allowed "
                "(powers of ten don't count)"
            )


def _digits(number: str) -> int:
    """A number's digits without zeros at their ends; 1 for what isn't a number above 0."""
    try:
        digits = "".join(map(str, Decimal(number).as_tuple().digits)).strip("0")
    except ArithmeticError:
        return 1  # llguidance refuses it
    return int(digits or "1")
