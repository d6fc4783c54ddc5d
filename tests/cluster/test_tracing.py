"""A request is one trace, from the caller's span through the gateway to what its group did."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import pytest
from loraplex.cluster.errors import SettingsError
from loraplex.cluster.tracing import Tracer, make_tracer
from loraplex.workers.front.traces import TracedRequests
from loraplex.workers.request_times import RequestTimes
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.cluster.gateway_fakes import Bench, make_bench
from tests.cluster.gateway_store import MemoryStore


def tracer() -> tuple[Tracer, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    return Tracer("test", exporter, at_once=True), exporter


def caller(sampled: bool = True) -> tuple[str, int, int]:
    """A caller's traceparent with its ids."""
    trace, span = random.getrandbits(128) | 1, random.getrandbits(64) | 1
    return f"00-{trace:032x}-{span:016x}-{'01' if sampled else '00'}", trace, span


@pytest.fixture
async def bench() -> Bench:
    return make_bench(MemoryStore())


async def ask(bench: Bench, key: str, traceparent: str | None = None):
    headers = {"traceparent": traceparent} if traceparent else {}
    async with bench.client(key) as client, bench.app.router.lifespan_context(bench.app):
        body = {"model": "style", "prompt": "fox", "max_tokens": 4}
        return await client.post("/v1/completions", json=body, headers=headers)


async def test_a_request_is_one_trace_from_its_caller_to_its_group(bench):
    bench.deps.tracer, spans = tracer()
    tenant = bench.tenant("acme")
    digest = bench.adapter(tenant, "style")
    traceparent, trace_id, parent_id = caller()
    response = await ask(bench, tenant.key, traceparent)
    assert response.status_code == 200
    (gateway,) = spans.get_finished_spans()
    assert gateway.name == "POST /v1/completions"
    assert (gateway.context.trace_id, gateway.parent.span_id) == (trace_id, parent_id)
    assert gateway.attributes["http.response.status_code"] == 200
    assert gateway.attributes["loraplex.tenant"] == "acme"
    assert gateway.attributes["loraplex.digest"] == digest
    assert gateway.attributes["loraplex.request_id"] == response.headers["x-request-id"]

    # The same request at its group: the wire's map in, the engine's times out.
    (request,) = bench.dispatcher.requests
    group_tracer, group_spans = tracer()
    traced = TracedRequests("g0", group_tracer.group_request)
    traced.begin("id#0", request.to_wire())
    times = RequestTimes(accepted_s=10.0, load_s=1.0, admitted_s=13.0, first_token_s=13.5)
    traced.see([{"id": "id#0", "tok": [1]}])
    assert group_spans.get_finished_spans() == ()
    last = {"id": "id#0", "tok": [2], "finish_reason": "stop", "spans": times.spans(14.5)}
    traced.see([last])
    found = {span.name: span for span in group_spans.get_finished_spans()}
    assert list(found) == ["queue", "load", "prefill", "decode", "group"]
    group = found.pop("group")
    assert group.parent.span_id == gateway.context.span_id
    assert group.attributes["loraplex.digest"] == digest
    at = group.start_time
    for span, seconds in zip(found.values(), (2.0, 1.0, 0.5, 1.0), strict=True):
        assert span.context.trace_id == trace_id
        assert span.parent.span_id == group.context.span_id
        assert span.start_time == at
        assert span.end_time - at == pytest.approx(seconds * 1e9, abs=10)
        at = span.end_time
    assert group.end_time >= at


@pytest.mark.parametrize("traced", [False, True])
async def test_what_nobody_samples_costs_its_group_nothing(bench, traced):
    if traced:
        bench.deps.tracer, spans = tracer()
    tenant = bench.tenant("acme")
    bench.adapter(tenant, "style")
    assert (await ask(bench, tenant.key, caller(sampled=False)[0])).status_code == 200
    (request,) = bench.dispatcher.requests
    assert "traceparent" not in request.to_wire()
    if traced:
        assert spans.get_finished_spans() == ()


async def test_a_traceparent_that_isnt_one_starts_a_trace_of_its_own(bench):
    bench.deps.tracer, spans = tracer()
    tenant = bench.tenant("acme")
    bench.adapter(tenant, "style")
    assert (await ask(bench, tenant.key, "00-zz-1-01")).status_code == 200
    (gateway,) = spans.get_finished_spans()
    assert gateway.parent is None


def test_requests_that_end_without_a_word_of_the_engine_are_errors():
    group_tracer, spans = tracer()
    traced = TracedRequests("g0", group_tracer.group_request)
    wire = {"id": "r", "tenant": "t", "adapter": None, "traceparent": caller()[0]}
    for i in range(3):
        traced.begin(f"r#{i}", wire)
    traced.begin("r#9", {**wire, "traceparent": None})
    traced.see([{"id": "r#0", "tok": [], "finish_reason": "error", "error_code": "oops"}])
    traced.drop(["r#1"], "aborted")
    traced.drop_all("group_failed")
    said = [span.status.description for span in spans.get_finished_spans()]
    assert said == ["oops", "aborted", "group_failed"]


def test_without_an_endpoint_opentelemetry_isnt_even_imported():
    assert make_tracer(None, "x") is None
    code = (
        "import sys, loraplex.cluster.tracing as t, loraplex.workers.front.traces\n"
        "assert t.make_tracer(None, 'x') is None\n"
        "assert not [m for m in sys.modules if m.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_endpoint_without_opentelemetry_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SettingsError, match=r"loraplex\[tracing\]"):
        make_tracer("http://127.0.0.1:4318/v1/traces", "x")


def test_times_of_an_engine_become_spans_that_end_now():
    now = time.monotonic()
    times = RequestTimes(accepted_s=now - 3)
    assert sum(times.spans(now).values()) == pytest.approx(3)
