"""Log lines: JSON that names request, tenant and digest, or text that does."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest
from loraplex.cluster.logs import (
    JsonFormatter,
    LogConfig,
    add_log_fields,
    begin_log_fields,
    configure_logs,
)
from loraplex.workers import AdapterRef, GenerationRequest, SamplingParams

from tests.cluster.gateway_fakes import make_bench
from tests.cluster.gateway_store import MemoryStore


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    logger = logging.getLogger("loraplex")
    before = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate, level = before
    logger.setLevel(level)


def logged(format_: str, level: str = "INFO") -> io.StringIO:
    """Where lines go from now on."""
    configure_logs(LogConfig(format_, level), "gateway")  # type: ignore[arg-type]
    (handler,) = logging.getLogger("loraplex").handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.stream = io.StringIO()
    return handler.stream


async def test_each_line_of_a_request_carries_what_is_known_of_it_and_no_others():
    out = logged("json")
    log = logging.getLogger("loraplex.cluster.x")

    async def request(number: int) -> None:
        begin_log_fields(request_id=f"r{number}")
        await asyncio.sleep(0.001 * (3 - number))
        log.info("first")
        await asyncio.create_task(asyncio.to_thread(add_log_fields, tenant=f"t{number}"))
        log.info("second", extra={"digest": f"d{number}"})

    await asyncio.gather(*map(request, range(3)))
    log.info("outside")
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert len(lines) == 7
    for number in range(3):
        first, second = (x for x in lines if x.get("request_id") == f"r{number}")
        assert "tenant" not in first
        assert (second["tenant"], second["digest"]) == (f"t{number}", f"d{number}")
        assert second["component"] == "gateway"
        assert second["level"] == "info"
    assert "request_id" not in lines[-1]


def test_a_traceback_stays_in_its_line():
    out = logged("json")
    try:
        raise ValueError("bad\nvalue")
    except ValueError:
        logging.getLogger("loraplex.workers.y").exception("failed %d times", 2)
    (line,) = (json.loads(line) for line in out.getvalue().splitlines())
    assert line["message"] == "failed 2 times"
    assert "ValueError: bad\nvalue" in line["exception"]


def test_text_lines_end_with_the_fields():
    out = logged("text", "WARNING")
    log = logging.getLogger("loraplex.z")
    log.info("not this")
    log.warning("that", extra={"tenant": "acme"})
    (line,) = out.getvalue().splitlines()
    assert line.endswith("WARNING loraplex.z: that [tenant=acme]")


async def test_a_gateway_writes_one_line_for_each_answer():
    out = logged("json")
    bench = make_bench(MemoryStore())
    tenant = bench.tenant("acme")
    digest = bench.adapter(tenant, "style")
    async with bench.app.router.lifespan_context(bench.app), bench.client(tenant.key) as client:
        body = {"model": "style", "prompt": "fox", "max_tokens": 4}
        headers = {"x-request-id": "abc-1"}
        assert (await client.post("/v1/completions", json=body, headers=headers)).status_code == 200
        await client.get("/health")
    (line,) = (json.loads(line) for line in out.getvalue().splitlines())
    assert line["request_id"] == "abc-1"
    assert (line["tenant"], line["digest"]) == ("acme", digest)
    assert (line["route"], line["status"]) == ("/v1/completions", 200)
    (request,) = bench.dispatcher.requests
    assert request.log_fields["request_id"] == "abc-1"


def test_a_groups_lines_name_the_http_request():
    ref = AdapterRef("t", "ab" * 32)
    request = GenerationRequest("client.id.0123", (1,), SamplingParams(), "t", ref)
    assert request.log_fields == {"request_id": "client.id", "tenant": "t", "digest": "ab" * 32}
    record = logging.makeLogRecord({"msg": "x", **request.log_fields})
    assert json.loads(JsonFormatter("engine").format(record))["digest"] == "ab" * 32
