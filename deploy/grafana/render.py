"""A dashboard as a picture, without Grafana: its JSON and a Prometheus are all that it takes.

    python deploy/grafana/render.py overview --prometheus http://127.0.0.1:9090 --out board.svg

Every panel's own queries are asked for the last minutes; variables stand for all. Several
dashboards are drawn one below the other. `--panels` keeps those with these titles.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from svg import FAINT, Box, Series, chart, document, figure, text

DASHBOARDS = Path(__file__).parent / "dashboards"
COLUMNS, COLUMN_PX, ROW_PX, GAP_PX = 24, 52, 30, 6  # of Grafana's grid, in pixels
HEAD_PX = 34
POINTS = 120
RATE_INTERVAL = "30s"


class Prometheus:
    """Asks for a span of time."""

    def __init__(self, url: str, start: float, end: float) -> None:
        self._url, self.start, self.end = url.rstrip("/"), start, end

    def series(self, expr: str) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """(labels, points) of an expression. Raises OSError when Prometheus can't be asked."""
        step = (self.end - self.start) / POINTS
        params = {"query": expr, "start": self.start, "end": self.end, "step": step}
        url = f"{self._url}/api/v1/query_range?{urllib.parse.urlencode(params)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            found = json.load(answer)["data"]["result"]
        times = [self.start + i * step for i in range(POINTS + 1)]
        series = []
        for one in found:
            values = {round(float(t), 2): float(v) for t, v in one["values"]}
            points = [(t, values.get(round(t, 2), math.nan)) for t in times]
            series.append((one["metric"], points))
        return series


def draw(boards: list[dict[str, Any]], source: Prometheus, titles: list[str]) -> str:
    """The SVG of the boards' panels; those with `titles` only, if there are any."""
    parts: list[str] = []
    y = 0.0
    for board in boards:
        panels = [p for p in board["panels"] if not titles or p["title"] in titles]
        parts.append(text(GAP_PX, y + 23, board["title"], 16))
        parts.append(text(COLUMNS * COLUMN_PX, y + 23, board["description"], 12, FAINT, "end"))
        y += HEAD_PX
        boxes = _boxes(panels, y)
        parts += [_draw_panel(p, box, source) for p, box in zip(panels, boxes, strict=True)]
        y = max((b.y + b.height + GAP_PX for b in boxes), default=y)
    return document(COLUMNS * COLUMN_PX + GAP_PX, y + GAP_PX, parts)


def _boxes(panels: list[dict[str, Any]], top: float) -> list[Box]:
    """Places as in the dashboard, closed up where panels were left out."""
    boxes: list[Box] = []
    x = y = height = 0
    for panel in panels:
        width, own = panel["gridPos"]["w"], panel["gridPos"]["h"]
        if x + width > COLUMNS or (height and own != height):
            x, y, height = 0, y + height, 0
        boxes.append(
            Box(
                x * COLUMN_PX + GAP_PX,
                top + y * ROW_PX,
                width * COLUMN_PX - GAP_PX,
                own * ROW_PX - GAP_PX,
            )
        )
        x, height = x + width, own
    return boxes


def _draw_panel(panel: dict[str, Any], box: Box, source: Prometheus) -> str:
    defaults = panel["fieldConfig"]["defaults"]
    unit = defaults.get("unit", "short")
    series = [
        Series(_legend(target.get("legendFormat", ""), labels), points)
        for target in panel["targets"]
        for labels, points in source.series(_plain(target["expr"]))
    ]
    if panel["type"] == "stat":
        known = [v for s in series for _, v in s.points if math.isfinite(v)]
        return figure(box, panel["title"], known[-1] if known else math.nan, unit)
    stacking = defaults.get("custom", {}).get("stacking", {}).get("mode", "none")
    span = (source.start, source.end)
    return chart(box, panel["title"], series, unit, stacking == "normal", span)


def _plain(expr: str) -> str:
    """As Grafana would send it, with "All" chosen everywhere."""
    return re.sub(r"\$\w+", ".*", expr.replace("$__rate_interval", RATE_INTERVAL))


def _legend(template: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda m: labels.get(m[1], ""), template)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("boards", nargs="+", help="names of files in dashboards/, without .json")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--panels", nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    boards = [json.loads((DASHBOARDS / f"{name}.json").read_text()) for name in args.boards]
    now = time.time()
    source = Prometheus(args.prometheus, now - 60 * args.minutes, now)
    args.out.write_text(draw(boards, source, args.panels))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
