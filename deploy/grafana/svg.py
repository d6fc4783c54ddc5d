"""Draws a dashboard's panels as SVG: numbers and lines over time, nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape

BACKGROUND, PANEL, EDGE, TEXT, FAINT = "#111217", "#181b1f", "#2c3235", "#d8d9da", "#8e8e8e"
COLOURS = (
    "#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#37b8b0", "#e0a3c2",
    "#8ab8ff", "#c4a24f", "#96d98d", "#ffb357",
)  # fmt: skip
FONT = 'font-family="Helvetica, Arial, sans-serif"'
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 34, 22
_LEGEND_ROW, _LEGEND_ROWS, _CHAR = 16, 2, 6.2  # pixels, rows, pixels of a character

Point = tuple[float, float]  # Unix time, value (NaN: a gap)


@dataclass(frozen=True)
class Box:
    """A panel's place, in pixels."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Series:
    """One line. All series of a stacked chart have the same times."""

    name: str
    points: Sequence[Point]


def document(width: float, height: float, parts: Sequence[str]) -> str:
    """The whole picture."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}">'
    )
    ground = f'<rect width="100%" height="100%" fill="{BACKGROUND}"/>'
    return "\n".join((head, ground, *parts, "</svg>\n"))


def text(x: float, y: float, words: str, size: int, colour: str = TEXT, anchor="start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" {FONT} font-size="{size}" fill="{colour}" '
        f'text-anchor="{anchor}">{escape(words)}</text>'
    )


def figure(box: Box, title: str, value: float, unit: str) -> str:
    """A panel with a single number."""
    middle = box.x + box.width / 2
    shown = "no data" if math.isnan(value) else show(value, unit)
    return "\n".join(
        (
            _frame(box, title),
            text(middle, box.y + box.height / 2 + 24, shown, 30, COLOURS[0], "middle"),
        )
    )


def chart(
    box: Box, title: str, series: Sequence[Series], unit: str, stacked: bool, span: Point
) -> str:
    """A panel with lines over time.

    Args:
        span: first and last time shown.
    """
    series = _most_important(series, len(COLOURS))
    rows, legend = _legend(box, [s.name for s in series])
    plot = Box(
        box.x + _LEFT,
        box.y + _TOP,
        box.width - _LEFT - _RIGHT,
        box.height - _TOP - _BOTTOM - rows * _LEGEND_ROW,
    )
    layers = _stack(series) if stacked else [[(t, 0.0, v) for t, v in s.points] for s in series]
    tops = [v for layer in layers for _, _, v in layer if math.isfinite(v)]
    marks = ticks(max(tops, default=0.0))
    start, end = span

    def at(t: float, v: float) -> str:
        x = plot.x + plot.width * (t - start) / (end - start)
        return f"{x:.1f},{plot.y + plot.height * (1 - v / marks[-1]):.1f}"

    parts = [_frame(box, title), *_axes(plot, marks, unit, span)]
    for layer, colour in zip(layers, COLOURS, strict=False):
        for run in _runs(layer):
            line = " ".join(at(t, v) for t, _, v in run)
            if stacked:
                back = " ".join(at(t, low) for t, low, _ in reversed(run))
                area = f'<polygon points="{line} {back}" fill="{colour}" fill-opacity="0.6"/>'
                parts.append(area)
            parts.append(
                f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            )
    return "\n".join((*parts, *legend))


def ticks(top: float, count: int = 4) -> list[float]:
    """0 and round numbers up to at least `top`."""
    if top <= 0:
        return [0.0, 1.0]
    rough = top / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def show(value: float, unit: str) -> str:
    """A value as people read it. Units are Grafana's names."""
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit == "s":
        for factor, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
            if value >= factor:
                return f"{value / factor:.3g} {name}"
        return "0 s" if value == 0 else f"{value:.2g} s"
    ending = {"bytes": "B", "Bps": "B/s", "reqps": "/s", "cps": "/s"}.get(unit, "")
    for factor, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {name}{ending}"
    return f"{value:.3g} {ending}".rstrip()


def _frame(box: Box, title: str) -> str:
    return (
        f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="3" fill="{PANEL}" stroke="{EDGE}"/>\n'
        + text(box.x + 10, box.y + 20, title, 13)
    )


def _axes(plot: Box, marks: Sequence[float], unit: str, span: Point) -> list[str]:
    parts = []
    for mark in marks:
        y = plot.y + plot.height * (1 - mark / marks[-1])
        parts.append(
            f'<line x1="{plot.x:.1f}" x2="{plot.x + plot.width:.1f}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="{EDGE}"/>'
        )
        parts.append(text(plot.x - 6, y + 4, show(mark, unit), 10, FAINT, "end"))
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        when = datetime.fromtimestamp(span[0] + share * (span[1] - span[0]))
        x = plot.x + share * plot.width
        clock = f"{when:%H:%M:%S}"
        parts.append(text(x, plot.y + plot.height + 15, clock, 10, FAINT, anchor))
    return parts


def _legend(box: Box, names: Sequence[str]) -> tuple[int, list[str]]:
    """How many rows, and the names that fit in them."""
    x, row, parts = box.x + 10, 0, []
    places: list[tuple[float, int, str, str]] = []
    for name, colour in zip(names, COLOURS, strict=False):
        width = 22 + _CHAR * len(name)
        if x + width > box.x + box.width and x > box.x + 10:
            x, row = box.x + 10, row + 1
        if row == _LEGEND_ROWS:
            break
        places.append((x, row, name, colour))
        x += width
    rows = max((row for _, row, _, _ in places), default=-1) + 1
    for x, row, name, colour in places:
        y = box.y + box.height - 8 - (rows - 1 - row) * _LEGEND_ROW
        parts.append(f'<rect x="{x:.1f}" y="{y - 7:.1f}" width="10" height="4" fill="{colour}"/>')
        parts.append(text(x + 14, y, name, 10, FAINT))
    return rows, parts


def _most_important(series: Sequence[Series], count: int) -> list[Series]:
    """Those with the largest values, in their given order."""

    def weight(s: Series) -> float:
        return sum(v for _, v in s.points if math.isfinite(v))

    kept = sorted(series, key=weight, reverse=True)[:count]
    return [s for s in series if s in kept]


def _stack(series: Sequence[Series]) -> list[list[tuple[float, float, float]]]:
    below: dict[float, float] = {}
    layers = []
    for s in series:
        layer = []
        for t, v in s.points:
            low = below.get(t, 0.0)
            below[t] = low + (v if math.isfinite(v) else 0.0)
            layer.append((t, low, below[t]))
        layers.append(layer)
    return layers


def _runs(
    layer: Sequence[tuple[float, float, float]],
) -> list[list[tuple[float, float, float]]]:
    """A layer cut up at its gaps."""
    runs: list[list[tuple[float, float, float]]] = [[]]
    for point in layer:
        if math.isfinite(point[2]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if len(run) > 1]
