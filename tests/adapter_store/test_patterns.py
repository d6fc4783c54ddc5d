"""Patterns of an upload mean what Python's `re` makes of them, and can't hold the process up."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.adapter_store import AdapterRefused
from loraplex.adapter_store.patterns import Pattern, PatternError, PatternTable
from peft.utils.other import get_pattern_key

ALPHABET = "ab1._"
pieces = st.sampled_from(
    [*ALPHABET, r"\.", r"\d", r"\w", r"\D", r"\S", "[ab]", "[^a1]", "[a-b_]", "[0-9]", "^", "$", ""]
)
patterns = st.recursive(
    pieces,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})"),
        inner.map(lambda p: f"({p})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?", "+?"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        ),
    ),
    max_leaves=8,
)
names = st.text(ALPHABET, max_size=12)


@given(text=patterns, name=names)
@settings(max_examples=500, deadline=None)
def test_matches_as_re_does(text: str, name: str) -> None:
    pattern = Pattern(text)
    assert pattern.fullmatch(name) == (re.fullmatch(text, name) is not None)
    assert pattern.match(name) == (re.match(text, name) is not None)


@given(table=st.dictionaries(patterns | names, st.integers(1, 99), max_size=5), name=names)
@settings(max_examples=300, deadline=None)
def test_finds_the_pattern_that_peft_finds(table: dict[str, int], name: str) -> None:
    expected = table.get(get_pattern_key(list(table), name), 0)
    # PEFT looks the name itself up when no pattern fits; a plain name always fits itself.
    assert PatternTable(table).get(name, 0) == expected


@pytest.mark.parametrize(
    "text", ["(a+)+x", "(a|a)*x", "(.*a){12}x", "((a?){20}){20}x", "(" * 40 + "a" + ")*" * 40 + "x"]
)
def test_patterns_that_explode_in_re(text: str) -> None:
    """`re` would take longer than the universe has: a regression ends in pytest's timeout."""
    try:
        pattern = Pattern(text)
    except PatternError:
        return
    assert not pattern.fullmatch("a" * 200)


def test_costly_patterns_are_refused_while_matching() -> None:
    pattern = Pattern(".*a.{900}")
    names = ["".join(random.choices("ab", k=60)) for _ in range(1000)]
    with pytest.raises(AdapterRefused, match="take too long"):
        any(pattern.fullmatch(name) for name in names)


def test_thousands_of_plain_names_are_looked_up_not_tried() -> None:
    table = {
        f"model.layers.{layer}.mlp.experts.{e}.{name}": layer * 1000 + e
        for layer in range(20)
        for e in range(64)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    lookup = PatternTable(table)
    assert all(lookup.get(name, -1) == value for name, value in table.items())
    assert lookup.get("model.layers.20.mlp.experts.0.up_proj", -1) == -1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(", "isn't a regular expression"),
        ("a{5}{5}", "isn't a regular expression"),
        (r"(a)\1", "groupref"),
        ("(?=a)", "assert"),
        (r"\bword", "at"),
        ("(?i)a", "inline flags"),
        ("(?i:a)", "inline flags"),
        ("((a{60}){60}){60}", "too large"),
        ("a" * 513, "at most 512"),
    ],
)
def test_what_isnt_supported_is_said(text: str, message: str) -> None:
    with pytest.raises(PatternError, match=message):
        Pattern(text)


def test_too_many_patterns() -> None:
    with pytest.raises(PatternError, match="'a64\\+' is one of more than 64"):
        PatternTable({f"a{i}+": 1 for i in range(65)})
    with pytest.raises(PatternError, match=r"^'x\('"):
        PatternTable({"x(": 1})


@given(text=st.text(max_size=20))
def test_any_text_is_a_pattern_or_refused(text: str) -> None:
    try:
        pattern = Pattern(text)
    except PatternError:
        return
    if text.isascii():
        pattern.fullmatch("model.layers.0.self_attn.q_proj")
