"""Bars of a comparison as an SVG, by hand: one row a scenario, one bar a policy, log scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from .summary import Summary

_COLOURS = ("#1b6ca8", "#9aa5b1", "#c98b2b", "#7a9e5f", "#b0413e")
_LEFT, _WIDTH, _BAR, _GAP, _TOP = 150, 520, 9, 14, 56


def bars(
    results: Mapping[str, Sequence[Summary]], field: str, title: str, smallest: float = 0.01
) -> str:
    """
    Args:
        results: scenario -> a summary a policy, in the same order everywhere.
        field: of `Summary`.
        smallest: what is at or below it has no length: the scale is logarithmic.
    """
    largest = max((getattr(s, field) for row in results.values() for s in row), default=1.0)
    decades = max(1.0, math.log10(max(largest, 10 * smallest) / smallest))
    out: list[str] = []
    y = _TOP
    for name, row in results.items():
        out.append(_text(_LEFT - 8, y + len(row) * _BAR / 2 + 4, name, "end"))
        for i, summary in enumerate(row):
            value = getattr(summary, field)
            length = _WIDTH * max(0.0, math.log10(max(value, smallest) / smallest)) / decades
            colour = _COLOURS[i % len(_COLOURS)]
            out.append(
                f'<rect x="{_LEFT}" y="{y}" width="{max(1.0, length):.1f}" height="{_BAR - 1}" '
                f'fill="{colour}"/>'
            )
            out.append(_text(_LEFT + max(1.0, length) + 4, y + _BAR - 1, f"{value:g}", size=8))
            y += _BAR
        y += _GAP
    policies = [s.policy for s in next(iter(results.values()), ())]
    legend = [
        f'<rect x="{_LEFT + 90 * i}" y="30" width="10" height="10" fill="{_COLOURS[i % 5]}"/>'
        + _text(_LEFT + 90 * i + 14, 39, policy)
        for i, policy in enumerate(policies)
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 70}" height="{y}" '
        'font-family="sans-serif" font-size="11">'
        '<rect width="100%" height="100%" fill="white"/>'
    )
    return "\n".join([head, _text(_LEFT, 18, title, size=13), *legend, *out, "</svg>\n"])


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 11) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(text)}</text>"
    )
