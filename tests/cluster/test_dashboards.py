"""Dashboards and rules follow from the declared metrics, and every query in them parses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import promql_parser
import pytest
import yaml
from loraplex.cluster.metrics import METRICS

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARDS = DEPLOY / "grafana" / "dashboards"
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}
RUNBOOK = DEPLOY.parent / "docs" / "runbook.md"
RULES = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())
# What Prometheus and prometheus-client export by themselves.
BUILT_IN = {"up", "process_resident_memory_bytes"}


def rules() -> list[dict]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def panels() -> list[dict]:
    return [panel for board in BOARDS.values() for panel in board["panels"]]


def dashboard_expressions() -> list[str]:
    """As Grafana would send them: variables replaced."""
    found = [t["expr"] for panel in panels() for t in panel.get("targets", [])]
    return [
        e.replace("$__rate_interval", "30s").replace("$group", ".*").replace("$tenant", ".*")
        for e in found
    ]


def selectors(expression: str) -> set[tuple[str, frozenset[str]]]:
    """(metric, labels it is filtered by) of every selector in a query."""
    found: set[tuple[str, frozenset[str]]] = set()

    def visit(node) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            labels = frozenset(m.name for m in node.matchers.matchers if m.name != "__name__")
            found.add((node.name, labels))
        for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
            child = getattr(node, name, None)
            if child is not None and not isinstance(child, str):
                visit(child)
        for child in getattr(node, "args", None) or ():
            visit(child)

    visit(promql_parser.parse(expression))
    return found


def samples() -> dict[str, tuple[str, ...]]:
    return {s: m.labels for m in METRICS.values() for s in m.samples()}


def test_the_committed_dashboards_are_what_the_generator_makes(tmp_path):
    command = [sys.executable, str(DEPLOY / "grafana" / "generate.py"), "--out", str(tmp_path)]
    # conftest.py keeps scripts' own folders off the path
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    subprocess.run(command, check=True, capture_output=True, env=env)
    made, committed = (
        {path.name: path.read_text() for path in folder.glob("*.json")}
        for folder in (tmp_path, DASHBOARDS)
    )
    assert made == committed, "run python deploy/grafana/generate.py"


def test_every_selector_of_the_dashboard_names_a_declared_metric_and_its_labels():
    declared = samples()
    expressions = dashboard_expressions()
    assert len(expressions) >= len(METRICS)
    for expression in expressions:
        names = selectors(expression)
        assert names, expression
        for name, labels in names:
            assert name in declared or name in BUILT_IN, f"{name} in {expression}"
            if name in declared:
                assert labels <= set(declared[name]), expression


def test_every_declared_metric_is_on_some_panel():
    shown = {name for e in dashboard_expressions() for name, _ in selectors(e)}
    missing = [m.name for m in METRICS.values() if not shown & set(m.samples())]
    assert missing == []


@pytest.mark.parametrize("name", BOARDS)
def test_panels_have_unique_ids_descriptions_and_dont_overlap(name):
    own_panels = BOARDS[name]["panels"]
    ids = [p["id"] for p in own_panels]
    assert len(set(ids)) == len(ids)
    cells: set[tuple[int, int]] = set()
    for panel in own_panels:
        box = panel["gridPos"]
        own = {
            (x, y)
            for x in range(box["x"], box["x"] + box["w"])
            for y in range(box["y"], box["y"] + box["h"])
        }
        assert not own & cells, panel["title"]
        assert box["x"] + box["w"] <= 24
        cells |= own
        assert panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"


def test_there_is_a_dashboard_for_each_subject_and_they_are_told_apart():
    subjects = {"overview", "tenant", "adapter", "group", "controller", "store"}
    assert BOARDS.keys() == subjects == {m.board for m in METRICS.values()}
    for field in ("uid", "title", "description"):
        assert len({board[field] for board in BOARDS.values()}) == len(BOARDS)


def test_variables_that_panels_use_are_declared_on_their_dashboard():
    for board in BOARDS.values():
        declared = {v["name"] for v in board["templating"]["list"]} | {"__rate_interval"}
        text = json.dumps(board["panels"])
        assert set(re.findall(r"\$\{?(\w+)", text)) <= declared


@pytest.mark.parametrize("rule", rules(), ids=lambda r: r.get("alert") or r["record"])
def test_every_rule_parses_and_names_only_what_exists(rule):
    recorded = {r["record"] for r in rules() if "record" in r}
    declared = samples()
    names = selectors(rule["expr"])
    assert names
    for name, labels in names:
        assert name in declared or name in BUILT_IN or name in recorded, name
        if name in declared:
            assert labels <= set(declared[name])


@pytest.mark.parametrize("rule", [r for r in rules() if "alert" in r], ids=lambda r: r["alert"])
def test_every_alert_says_what_is_wrong_and_what_to_do(rule):
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"]["summary"]
    runbook = rule["annotations"]["runbook"]
    assert len(runbook) > 40
    assert f"## {rule['alert']}\n" in RUNBOOK.read_text()
    from loraplex.cluster.settings import Settings

    for variable in re.findall(r"LORAPLEX_([A-Z_]+)", runbook):
        assert variable.lower() in Settings.model_fields, variable


def test_prometheus_scrapes_what_the_admin_side_lists():
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert config["rule_files"] == ["rules.yml"]
    (job,) = config["scrape_configs"]
    assert job["honor_labels"] is True
    (discovery,) = job["http_sd_configs"]
    assert discovery["url"].endswith("/metrics/targets")


def test_grafana_provisioning_parses():
    for path in (DEPLOY / "grafana" / "provisioning").rglob("*.yml"):
        assert yaml.safe_load(path.read_text())["apiVersion"] == 1
