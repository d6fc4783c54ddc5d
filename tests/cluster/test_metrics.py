"""Metrics: what is declared is what is exported; series stay few; many processes become one."""

from __future__ import annotations

import importlib
import json
import math
import re
import socket
import urllib.error
import urllib.request

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.cluster.errors import SettingsError
from loraplex.cluster.metrics import (
    CONTROLLER,
    ENGINE,
    GATEWAY,
    INGEST,
    METRICS,
    STORE,
    ControllerMetrics,
    EngineMetrics,
    GatewayMetrics,
    IngestMetrics,
    Target,
    fan_in,
    http_sd,
    merge,
    new_registry,
    serve_metrics,
    serve_routes,
)
from loraplex.cluster.ports import free_port
from loraplex.workers import EngineReport
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

DIGEST = "ab" * 32
store_counts = importlib.import_module("loraplex.adapter_store.store_requests")


def samples(text: str) -> dict[tuple[str, frozenset], float]:
    return {
        (s.name, frozenset(s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def exported(registry: CollectorRegistry) -> dict[tuple[str, frozenset], float]:
    return samples(generate_latest(registry).decode())


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return exported(registry).get((name, frozenset(labels.items())))


def controller_tick(metrics: ControllerMetrics, **changes) -> None:
    figures = {
        "epoch": 3,
        "seconds": 0.01,
        "serving": 2,
        "draining": 0,
        "desired": {"g0": 2, "g1": 1},
        "placed": 2,
        "replicas": 1,
        "demand": {f"acme/{DIGEST}": 12.5},
        "pending_purges": 0,
        "totals": {
            "groups_lost": 0,
            "moves_planned": 3,
            "moves_done": 2,
            "moves_dropped": 1,
            "moved_bytes": 100,
        },
    }
    metrics.tick(**(figures | changes))


def full_gateway(registry: CollectorRegistry) -> GatewayMetrics:
    metrics = GatewayMetrics(registry)
    metrics.request("/v1/completions", 200, 0.5)
    metrics.generation_started()
    metrics.first_token("acme", "s3", 0.2)
    metrics.next_tokens(3, 0.06)
    metrics.tokens("acme", "pirate", 10, 20)
    metrics.limit_hit("acme", "tokens")
    metrics.generation_ended("acme", "t1", "pirate")
    metrics.auth_failure("unknown")
    metrics.upload("published")
    metrics.continuation()
    metrics.routed("cold")
    return metrics


def full_report(**changes) -> EngineReport:
    fields = {
        "queued": 1,
        "running": 2,
        "steps": 3,
        "step_seconds": 0.5,
        "kv_blocks_total": 100,
        "kv_blocks_used": 10,
        "preemptions": 1,
        "pool_bytes_total": 1000,
        "pool_bytes_used": 300,
        "gpu": {f"acme/{DIGEST}": 300},
        "disk": {f"acme/{DIGEST}": 150},
        "loading": ["acme/" + "cd" * 32],
        "prompt_tokens": {f"acme/{DIGEST}": 7, "acme/base": 5},
        "output_tokens": {f"acme/{DIGEST}": 9},
        "loads": {"s3": 1},
        "load_seconds": 0.25,
        "load_bytes": 300,
        "load_failures": 1,
        "evictions": 1,
        "prefix_hit_tokens": 4,
        "admissions": {"gpu": 3, "s3": 1},
        "queue_seconds": {"adapter": 0.5, "batch": 0.25},
        "step_tokens": 40,
        "step_adapters": 4,
        "step_adapter_bytes": 1200,
        "pool_bytes_active": 300,
        "tier_load_seconds": {"s3": 0.5},
        "tier_load_bytes": {"s3": 300},
        "store_requests": {"GetObject/ok": 3},
        "tenant_leads": {"acme": 12.5},
        "tenants_waiting": {"acme": 2},
    }
    return EngineReport(**(fields | changes))


@pytest.mark.parametrize("kind", ["gateway", "engine", "controller", "ingest"])
def test_a_process_exports_exactly_the_metrics_declared_for_its_kind(kind, monkeypatch):
    registry = CollectorRegistry()
    own = {"gateway": GATEWAY, "engine": ENGINE, "controller": CONTROLLER, "ingest": INGEST}[kind]
    declared = (*own, *STORE)
    monkeypatch.setattr(store_counts, "_counts", {("PutObject", "ok"): 1})
    if kind == "gateway":
        full_gateway(registry)
    elif kind == "engine":
        EngineMetrics(registry, "g0").update(full_report())
    elif kind == "controller":
        controller_tick(ControllerMetrics(registry))
    else:
        IngestMetrics(registry).ended("published", 0.5)
    families = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        name = family.name + "_total" if family.type == "counter" else family.name
        families[name] = family
    assert families.keys() == {m.name for m in declared}
    for metric in declared:
        family = families[metric.name]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        assert family.samples
        for sample in family.samples:
            assert sample.name in metric.samples()
            assert set(sample.labels) - {"le"} == set(metric.labels)


def test_declared_names_follow_the_conventions():
    for metric in METRICS.values():
        assert re.fullmatch(
            r"loraplex_(gateway|engine|controller|ingest|store)_[a-z0-9_]+", metric.name
        )
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        if metric.unit in ("seconds", "bytes"):
            assert re.search(rf"_{metric.unit}(_total)?$", metric.name)
        assert metric.help.endswith(".")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(metric.buckets)
    assert len(METRICS) == sum(map(len, (GATEWAY, ENGINE, CONTROLLER, INGEST, STORE)))


def test_engine_counters_add_up_over_a_restart_of_the_engine():
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry, "g0")
    key = f"acme/{DIGEST}"
    for steps, tokens, loads in ((10, 100, 2), (25, 160, 3), (4, 30, 1), (6, 30, 2)):
        metrics.update(
            EngineReport(
                steps=steps, output_tokens={key: tokens}, gpu={key: 1}, loads={"disk": loads}
            )
        )
    labels = {"group": "g0", "tenant": "acme", "adapter": DIGEST[:12]}
    assert value(registry, "loraplex_engine_steps_total", group="g0") == 25 + 6
    assert value(registry, "loraplex_engine_output_tokens_total", **labels) == 160 + 30
    assert value(registry, "loraplex_engine_loads_total", group="g0", tier="disk") == 3 + 2


def test_an_adapters_series_go_when_it_leaves_the_group():
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry, "g0")
    metrics.update(full_report())
    labels = {"group": "g0", "tenant": "acme", "adapter": DIGEST[:12]}
    names = ("prompt_tokens_total", "output_tokens_total", "adapter_bytes")
    for name in names:
        assert value(registry, f"loraplex_engine_{name}", **labels) is not None
    metrics.update(full_report(gpu={}))
    for name in names:
        assert value(registry, f"loraplex_engine_{name}", **labels) is None
    base = {**labels, "adapter": "base"}  # the base model never leaves
    assert value(registry, "loraplex_engine_prompt_tokens_total", **base) == 5


def test_adapter_series_are_few_and_no_token_is_lost():
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry, "g0", top_adapters=5)
    tokens: dict[str, int] = {}
    for i in range(200):
        key = f"t{i % 7}/{i:04x}{i:060x}"
        tokens[key] = 1 + (i * 37) % 50
        metrics.update(EngineReport(output_tokens=dict(tokens), gpu=dict.fromkeys(tokens, 1)))
        shown = [
            labels
            for name, labels in exported(registry)
            if name == "loraplex_engine_output_tokens_total"
        ]
        assert len(shown) <= 6
    gauge = {
        labels: v
        for (name, labels), v in exported(registry).items()
        if name == "loraplex_engine_adapter_bytes"
    }
    assert len(gauge) == 6
    assert sum(gauge.values()) == len(tokens)


def test_the_busiest_adapters_take_the_series_over_from_idle_ones():
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry, top_adapters=2)
    for name in ("a", "b", "c"):
        metrics.tokens("acme", name, 10, 0)
    assert (
        value(registry, "loraplex_gateway_input_tokens_total", tenant="other", adapter="other")
        == 10
    )
    metrics.tokens("acme", "c", 100, 0)
    shown = {
        dict(labels)["adapter"]: v
        for (name, labels), v in exported(registry).items()
        if name == "loraplex_gateway_input_tokens_total"
    }
    assert shown == {"b": 10, "c": 100, "other": 10}


def test_idle_adapters_lose_their_series_in_time():
    now = [0.0]
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry, clock=lambda: now[0])
    metrics.tokens("acme", "idle", 100, 100)
    labels = {"tenant": "acme", "adapter": "idle"}
    assert value(registry, "loraplex_gateway_output_tokens_total", **labels) == 100
    now[0] = 24 * 3600
    metrics.tokens("acme", "other-one", 1, 1)
    assert value(registry, "loraplex_gateway_output_tokens_total", **labels) is None


def test_a_deleted_adapters_series_go_at_once():
    registry = CollectorRegistry()
    metrics = full_gateway(registry)
    labels = {"tenant": "acme", "adapter": "pirate"}
    assert value(registry, "loraplex_gateway_output_tokens_total", **labels) == 20
    metrics.adapter_removed("acme", "pirate")
    assert value(registry, "loraplex_gateway_output_tokens_total", **labels) is None
    metrics.adapter_removed("acme", "never-there")


def test_a_deleted_tenants_series_go_with_its_adapters_and_others_stay():
    registry = CollectorRegistry()
    metrics = full_gateway(registry)
    metrics.tokens("acme", "base", 1, 1)
    metrics.tokens("zeta", "base", 1, 1)
    metrics.generation_ended("zeta", "t2", "base")
    assert metrics.shown() == {("acme", "t1"): {"pirate", "base"}, ("zeta", "t2"): {"base"}}
    metrics.tenant_removed("acme")
    tenants = {dict(labels).get("tenant") for _, labels in exported(registry)}
    assert tenants == {None, "zeta"}
    assert metrics.shown() == {("zeta", "t2"): {"base"}}


def test_what_is_told_by_one_label_is_there_before_it_happens():
    registry = CollectorRegistry()
    GatewayMetrics(registry)
    EngineMetrics(registry, "g0")
    for name, labels in (
        ("loraplex_gateway_auth_failures_total", {"reason": "unknown"}),
        ("loraplex_gateway_routing_decisions_total", {"reason": "cold"}),
        ("loraplex_engine_loads_total", {"group": "g0", "tier": "host"}),
        ("loraplex_engine_admitted_requests_total", {"group": "g0", "tier": "gpu"}),
    ):
        assert value(registry, name, **labels) == 0


def test_what_came_from_the_nodes_memory_is_told_apart():
    registry = CollectorRegistry()
    key, other = f"acme/{DIGEST}", "acme/" + "cd" * 32
    report = full_report(
        host={key: 150, other: 150},
        loads={"s3": 1, "host": 4},
        tier_load_seconds={"s3": 0.5, "host": 0.125},
        tier_load_bytes={"s3": 300, "host": 1200},
        admissions={"gpu": 3, "host": 5},
    )
    EngineMetrics(registry, "g0").update(EngineReport.from_wire(report.to_wire()))
    for name, held in (
        ("loraplex_engine_resident_adapters", 2),
        ("loraplex_engine_loads_total", 4),
        ("loraplex_engine_load_seconds_total", 0.125),
        ("loraplex_engine_load_bytes_total", 1200),
        ("loraplex_engine_admitted_requests_total", 5),
    ):
        assert value(registry, name, group="g0", tier="host") == held


def test_two_gateway_replicas_add_up_to_what_their_clients_saw():
    texts = []
    for replica, requests in (("r0", 3), ("r1", 5)):
        registry = new_registry()
        metrics = GatewayMetrics(registry)
        for _ in range(requests):
            metrics.request("/v1/completions", 200, 0.1)
            metrics.tokens("acme", "pirate", 2, 7)
        text = generate_latest(registry).decode()
        texts.append(({"kind": "gateway", "replica": replica}, text))
    merged = samples(merge(texts))
    for name, each in (("requests", 1), ("input_tokens", 2), ("output_tokens", 7)):
        full = f"loraplex_gateway_{name}_total"
        per_replica = {dict(k)["replica"]: v for (n, k), v in merged.items() if n == full}
        assert per_replica == {"r0": 3 * each, "r1": 5 * each}


def test_adapters_with_the_same_short_digest_add_up():
    registry = CollectorRegistry()
    same = {f"acme/{DIGEST[:60]}{i:04x}": 10 for i in range(3)}
    EngineMetrics(registry, "g0").update(EngineReport(gpu=same))
    labels = {"group": "g0", "tenant": "acme", "adapter": DIGEST[:12]}
    assert value(registry, "loraplex_engine_adapter_bytes", **labels) == 30


def test_several_tokens_at_once_count_one_gap_each():
    registry = CollectorRegistry()
    full_gateway(registry)
    assert value(registry, "loraplex_gateway_inter_token_seconds_count") == 3
    assert value(registry, "loraplex_gateway_inter_token_seconds_sum") == pytest.approx(0.06)


def test_groups_that_left_disappear_from_the_controllers_gauges():
    registry = CollectorRegistry()
    metrics = ControllerMetrics(registry)
    controller_tick(metrics)
    assert value(registry, "loraplex_controller_desired_adapters", group="g1") == 1
    controller_tick(metrics, desired={"g0": 1}, demand={})
    assert value(registry, "loraplex_controller_desired_adapters", group="g1") is None
    assert not [n for n, _ in exported(registry) if n.startswith("loraplex_controller_demand")]
    # Totals are cumulative: the same ones again add nothing.
    assert value(registry, "loraplex_controller_moves_total", result="planned") == 3


def test_merged_texts_parse_name_each_family_once_and_keep_every_sample():
    parts = []
    for i in range(3):
        registry = new_registry()
        EngineMetrics(registry, f"g{i}").update(full_report(queued=i))
        labels = {"kind": "group", "group": f"g{i}", "rank": "0"}
        parts.append((labels, generate_latest(registry).decode()))
    registry = new_registry()
    full_gateway(registry)
    parts.append(({"kind": "gateway", "replica": "r0"}, generate_latest(registry).decode()))
    text = merge(parts)
    heads = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads))
    merged = samples(text)
    for labels, part in parts:
        for (name, own), number in samples(part).items():
            key = (name, frozenset({**labels, **dict(own)}.items()))
            assert merged[key] == number or math.isnan(number)
    assert len(merged) == sum(len(samples(part)) for _, part in parts)


@given(
    st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r")),
    st.floats(allow_nan=False),
)
def test_any_label_value_and_number_survive_the_merge(label, number):
    from prometheus_client import Gauge

    registry = CollectorRegistry()
    Gauge("anything", "Has a \\ and\na newline.", ["name"], registry=registry).labels(label).set(
        number
    )
    text = merge([({"kind": label}, generate_latest(registry).decode())])
    expected = ("anything", frozenset({"kind": label, "name": label}.items()))
    assert samples(text) == {expected: number}


def test_a_sample_keeps_its_own_label_over_its_targets():
    text = 'x{group="own"} 1\ny 2\n'
    assert samples(merge([({"group": "target"}, text)])) == {
        ("x", frozenset({("group", "own")})): 1.0,
        ("y", frozenset({("group", "target")})): 2.0,
    }


def test_fan_in_reads_live_processes_and_shows_the_dead_as_down():
    registries = [new_registry(), new_registry()]
    full_gateway(registries[0])
    EngineMetrics(registries[1], "g0").update(full_report())
    servers = [serve_metrics(r, token="secret") for r in registries]
    try:
        targets = [
            Target("gateway", "127.0.0.1", servers[0][0], {"replica": "r0"}),
            Target("group", "127.0.0.1", servers[1][0], {"group": "g0", "rank": "0"}),
            Target("group", "127.0.0.1", free_port(), {"group": "dead", "rank": "0"}),
        ]
        merged = samples(fan_in(targets, "secret"))
        up = {
            dict(k)["kind"] + dict(k).get("group", ""): v
            for (n, k), v in merged.items()
            if n == "up"
        }
        assert up == {"gateway": 1, "groupg0": 1, "groupdead": 0}
        key = {"kind": "group", "group": "g0", "rank": "0"}
        assert merged["loraplex_engine_steps_total", frozenset(key.items())] == 3
        wrong = samples(fan_in(targets, "another"))
        assert {v for (n, _), v in wrong.items()} == {0.0}
    finally:
        for _, server in servers:
            server.close()


def test_one_process_with_a_broken_text_does_not_spoil_the_others():
    good, bad = (Target("group", "h", i, {"group": str(i)}) for i in (1, 2))

    def fetch(target: Target, token: str | None) -> str:
        return "fine 1\n" if target is good else "{not metrics at all 1 2 3\n"

    merged = samples(fan_in([good, bad], fetch=fetch))
    assert merged["fine", frozenset({("kind", "group"), ("group", "1")})] == 1
    assert merged["up", frozenset({("kind", "group"), ("group", "2")})] == 0


def test_http_sd_lists_targets_with_their_labels_in_a_stable_order():
    targets = [
        Target("group", "127.0.0.1", 7001, {"group": "g0", "rank": "0"}),
        Target("gateway", "::1", 7002, {"replica": "r"}),
    ]
    listed = json.loads(http_sd(targets))
    assert listed == [
        {"targets": ["[::1]:7002"], "labels": {"kind": "gateway", "replica": "r"}},
        {"targets": ["127.0.0.1:7001"], "labels": {"group": "g0", "kind": "group", "rank": "0"}},
    ]
    assert http_sd(targets) == http_sd(reversed(targets))
    assert all(isinstance(v, str) for t in listed for v in t["labels"].values())


def get(port: int, path: str, token: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_listener_is_on_loopback_and_serves_its_routes_only():
    registry = CollectorRegistry()
    full_gateway(registry)
    port, server = serve_metrics(registry)
    try:
        assert server.server_address[0] == "127.0.0.1"
        code, text = get(port, "/metrics?x=1")
        assert code == 200
        assert samples(text) == exported(registry)
        assert get(port, "/")[0] == 404
    finally:
        server.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_a_token_is_asked_for_when_there_is_one():
    port, server = serve_metrics(CollectorRegistry(), token="s3cret")
    try:
        assert get(port, "/metrics")[0] == 401
        assert get(port, "/metrics", "wrong")[0] == 401
        assert get(port, "/metrics", "s3cret")[0] == 200
    finally:
        server.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.com"])
def test_no_listener_that_others_can_reach_without_a_token(host):
    with pytest.raises(SettingsError, match="LORAPLEX_METRICS_TOKEN"):
        serve_metrics(CollectorRegistry(), host)


def test_loopback_has_a_second_family():
    try:
        port, server = serve_metrics(CollectorRegistry(), "::1")
    except SettingsError:
        pytest.skip("this machine has no IPv6 loopback")
    try:
        with socket.create_connection(("::1", port), timeout=5):
            pass
    finally:
        server.close()


def test_a_reader_that_hangs_up_early_leaves_no_traceback(capfd):
    port, server = serve_routes({"/big": ("text/plain", lambda: "x" * (32 << 20))}, "127.0.0.1")
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as reader:
            reader.sendall(b"GET /big HTTP/1.1\r\n\r\n")
            reader.recv(100)
        assert get(port, "/none")[0] == 404
    finally:
        server.close()
    assert "Traceback" not in capfd.readouterr().err


def test_a_busy_port_is_named():
    port, server = serve_metrics(CollectorRegistry())
    try:
        with pytest.raises(SettingsError, match=rf"127\.0\.0\.1:{port}.*LORAPLEX_METRICS_PORT"):
            serve_metrics(CollectorRegistry(), port=port)
    finally:
        server.close()


def test_a_route_that_fails_says_so_and_the_listener_lives_on():
    def fail() -> str:
        raise RuntimeError("no targets")

    routes = {"/bad": ("text/plain", fail), "/good": ("text/plain", lambda: "yes")}
    port, server = serve_routes(routes, "127.0.0.1")
    try:
        assert get(port, "/bad") == (500, "RuntimeError: no targets\n")
        assert get(port, "/good") == (200, "yes")
    finally:
        server.close()
