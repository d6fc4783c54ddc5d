"""The small script that draws dashboards: what it draws is what Prometheus said."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
SVG = "{http://www.w3.org/2000/svg}"
TOP = 7.0  # the largest value that the stand-in tells


class _Answers(http.server.BaseHTTPRequestHandler):
    """A Prometheus on which every query is a ramp from 0 to TOP, with a gap in its middle."""

    def do_GET(self) -> None:
        asked = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        start, end, step = (float(asked[name][0]) for name in ("start", "end", "step"))
        assert "$" not in asked["query"][0]
        count = round((end - start) / step)
        values = [
            [start + i * step, str(TOP * i / count)]
            for i in range(count + 1)
            if not 0.4 < i / count < 0.6
        ]
        data = {"result": [{"metric": {"group": "g<0>", "tier": "gpu"}, "values": values}]}
        body = json.dumps({"status": "success", "data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def url() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def render(url: str, out: Path, *args: str) -> ET.Element:
    command = [sys.executable, str(GRAFANA / "render.py"), *args, "--prometheus", url]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    subprocess.run([*command, "--out", str(out)], check=True, env=env, capture_output=True)
    return ET.fromstring(out.read_text())


def texts(picture: ET.Element) -> list[str]:
    return [element.text or "" for element in picture.iter(f"{SVG}text")]


def test_every_panel_is_drawn_with_its_title_legend_and_lines(url, tmp_path):
    picture = render(url, tmp_path / "group.svg", "group")
    board = json.loads((GRAFANA / "dashboards" / "group.json").read_text())
    titles = [panel["title"] for panel in board["panels"]]
    shown = texts(picture)
    assert set(titles) <= set(shown)
    assert "g<0>" in shown
    assert "no data" not in shown
    charts = [p for p in board["panels"] if p["type"] == "timeseries"]
    stacked = [p for p in charts if "stacking" in p["fieldConfig"]["defaults"].get("custom", {})]
    lines = list(picture.iter(f"{SVG}polyline"))
    queries, in_stacks = (sum(len(p["targets"]) for p in some) for some in (charts, stacked))
    assert len(lines) == 2 * queries - in_stacks  # the gap cuts a line in two; in a stack it is 0


def test_chosen_panels_are_drawn_to_scale(url, tmp_path):
    picture = render(url, tmp_path / "x.svg", "group", "--panels", "Tokens in a step", "Running")
    assert {"Tokens in a step", "Running", "7"} <= set(texts(picture))
    assert "Queued" not in texts(picture)
    rise, rest = (
        [tuple(map(float, point.split(","))) for point in line.get("points", "").split()]
        for line in picture.iter(f"{SVG}polyline")
    )
    grid = sorted(float(line.get("y1", "0")) for line in picture.iter(f"{SVG}line"))
    marks = [float(t) for t in texts(picture) if re.fullmatch(r"[\d.]+", t)]
    assert max(marks) >= TOP
    zero, highest = grid[-1], grid[0]
    assert rise[0][1] == pytest.approx(zero, abs=0.2)
    assert rest[-1][1] == pytest.approx(zero - (zero - highest) * TOP / max(marks), abs=0.2)
    assert rise[-1][0] < rest[0][0]
