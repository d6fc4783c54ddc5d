"""A real Prometheus on the running demo: every panel and every rule finds data, and it is true."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml

from tests.e2e.service import BASE, Service, Tenant, files_of
from tests.prometheus import DEPLOY, ROOT, Prometheus, program, running, wait_for

pytestmark = pytest.mark.cluster

BOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
KINDS = {"gateway", "group", "controller", "ingest"}


@pytest.fixture(scope="module")
def prometheus(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Generator[Prometheus]:
    with running(tmp_path_factory.mktemp("prometheus"), service.metrics_port()) as server:
        wait_for(
            lambda: {t["labels"]["kind"] for t in server.healthy()} == KINDS, "target of each kind"
        )
        with service.tenant(requests_per_minute=2) as tenant:
            work(service, tenant)
            yield server


def work(service: Service, limited: Tenant) -> None:
    """Some of everything: each adapter and the base model, an upload, what is refused."""
    limited.publish("mine", "whaler")
    config, weights = files_of("whaler")
    assert limited.upload("broken", config, weights[:-1]).status_code == 422
    body = {"model": "mine", "prompt": "a"}
    codes = [limited.http.post("/v1/completions", json=body).status_code for _ in range(4)]
    assert codes.count(429) == 2
    wrong = {"authorization": "Bearer wrong"}
    url = f"{service.url}/v1/models"
    assert httpx.get(url, headers=wrong, trust_env=False).status_code == 401
    jobs = [(owner, name) for name, owner in service.owners.items()] * 3
    jobs += [(service.any_tenant, BASE)] * 3
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda job: job[0].text(job[1], "It was", max_tokens=24), jobs))


# Nobody is ahead of others where nobody waits.
MAY_BE_EMPTY = ("loraplex_engine_tenant_lead_tokens", "loraplex_engine_tenant_waiting_requests")


def panels() -> list[tuple[str, str]]:
    """(panel, expression) of all dashboards, as Grafana would send them."""
    found = []
    for path in BOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                expr = target["expr"].replace("$__rate_interval", "1m")
                for name in ("group", "tenant"):
                    expr = expr.replace(f"${name}", ".*")
                found.append((f"{path.stem}: {panel['title']}", expr))
    return found


def test_every_panel_shows_data(prometheus: Prometheus) -> None:
    missing = {
        (title, expr): None
        for title, expr in panels()
        if not any(name in expr for name in MAY_BE_EMPTY)
    }
    assert len(missing) > 60

    def all_there() -> bool:
        for title, expr in list(missing):
            if any(not math.isnan(value) for _, value in prometheus.query(expr)):
                del missing[title, expr]
        return not missing

    try:
        wait_for(all_there, "data in every panel")
    except TimeoutError:
        pytest.fail("no data: " + "\n".join(f"{title}: {expr}" for title, expr in missing))


def test_every_rule_is_evaluated_without_error(prometheus: Prometheus) -> None:
    def evaluated() -> bool:
        groups = prometheus.get("rules")["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert not [r for r in rules if r["health"] == "err"], rules
        return all(r["health"] == "ok" for r in rules)

    wait_for(evaluated, "evaluation of all rules")
    firing = {a["labels"]["alertname"] for a in prometheus.get("alerts")["alerts"]}
    assert not firing & {"LoraplexControllerAbsent", "LoraplexNoGroupServes", "LoraplexTargetDown"}


def test_recorded_series_are_there(prometheus: Prometheus) -> None:
    rules = yaml.safe_load((DEPLOY / "rules.yml").read_text())["groups"]
    names = [rule["record"] for group in rules for rule in group["rules"] if "record" in rule]
    for name in names:
        wait_for(lambda name=name: prometheus.query(name), name)


def test_counts_are_those_of_the_client(service: Service, prometheus: Prometheus) -> None:
    with service.tenant() as tenant:
        tenant.publish("counted", "devil")
        usage = [
            tenant.http.post(
                "/v1/completions",
                json={"model": "counted", "prompt": prompt, "max_tokens": 5, "ignore_eos": True},
            ).json()["usage"]
            for prompt in ("one", "two words", "and now three")
        ]
        for name, field in (("input", "prompt_tokens"), ("output", "completion_tokens")):
            expr = f'sum(loraplex_gateway_{name}_tokens_total{{tenant="{tenant.name}"}})'
            told = float(sum(u[field] for u in usage))
            # A scrape may have come between two answers.
            shown = [({}, told)]
            wait_for(lambda e=expr, s=shown: prometheus.query(e) == s, f"{told:.0f} of {expr}")
        queue = f'sum(loraplex_gateway_generations_total{{tenant="{tenant.name}"}})'
        wait_for(lambda: prometheus.query(queue) == [({}, 3.0)], f"3 of {queue}")
    gone = f'count(loraplex_gateway_generations_total{{tenant="{tenant.name}"}})'
    wait_for(lambda: not prometheus.query(gone), "end of a deleted tenant's series")


@pytest.mark.parametrize("check", [["rules", "rules.yml"], ["config", "prometheus.yml"]])
def test_promtool_finds_nothing_wrong(check: list[str]) -> None:
    kind, file = check
    result = subprocess.run(
        [program("promtool"), "check", kind, str(DEPLOY / file)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_dashboards_can_be_drawn_without_grafana(
    prometheus: Prometheus, tmp_path: Path
) -> None:
    out = tmp_path / "boards.svg"
    names = [board.stem for board in BOARDS]
    options = ["--prometheus", prometheus.url, "--minutes", "1", "--out", str(out)]
    command = [sys.executable, str(ROOT / "deploy/grafana/render.py"), *names, *options]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    subprocess.run(command, check=True, env=env)
    assert out.read_text().count("<polyline") > len(panels()) / 2
