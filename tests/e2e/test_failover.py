"""Deaths in the running demo: no answer changes but those of a dead gateway's own connections."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.e2e.service import BASE, Service, Tenant

TOKENS = 120
BACK_S = 90.0
RANK, CONTROLLER = "ray::RankActor", "ray::ControllerActor"
GATEWAY = "ray::ServeReplica:gateway"


def wait_for(condition: Callable[[], object], timeout_s: float = BACK_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def stream(tenant: Tenant, model: str, begun: threading.Semaphore | None = None) -> tuple[str, int]:
    """Text and token count of a greedy completion; `begun` is released at its first piece."""
    text, tokens = "", 0
    for chunk in tenant.openai.completions.create(
        model=model,
        prompt="The day was",
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    ):
        text += "".join(choice.text for choice in chunk.choices)
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        if begun is not None:
            begun.release()
            begun = None
    return text, tokens


def is_ready(service: Service) -> bool:
    """What a probe would say that doesn't wait for a gateway to come."""
    try:
        return service.admin.get("/ready", timeout=5.0).is_success
    except httpx.TransportError:
        return False


def begin(
    pool: ThreadPoolExecutor, jobs: list[tuple[Tenant, str]]
) -> list[Future[tuple[str, int]]]:
    """Streams of all jobs, each of which has begun."""
    begun = threading.Semaphore(0)
    answers = [pool.submit(stream, *job, begun) for job in jobs]
    for _ in jobs:
        assert begun.acquire(timeout=BACK_S)
    return answers


@pytest.fixture
def jobs(service: Service) -> list[tuple[Tenant, str]]:
    return [(t, a) for a, t in service.owners.items()] + [(service.any_tenant, BASE)]


@pytest.mark.parametrize("title", [RANK, CONTROLLER])
def test_a_death_behind_the_gateway_changes_no_answer(service, jobs, title):
    wait_for(lambda: len(service.serving()) == 2)
    expected = [stream(*job) for job in jobs]
    assert all(tokens == TOKENS for _, tokens in expected)
    before, groups = service.placement()["epoch"], service.serving()
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = begin(pool, jobs)
        victim, *_ = service.processes(title)
        victim.kill()
        assert [a.result(120) for a in answers] == expected
        # Nobody has to wait for what died, either.
        assert [stream(*job) for job in jobs] == expected
    if title == RANK:
        wait_for(lambda: len(service.serving()) == 2 and service.serving() != groups)
        wait_for(lambda: len(service.processes(RANK)) == 2)
    else:
        # The new controller takes a higher epoch and finds the groups by their reports.
        wait_for(lambda: service.placement().get("epoch", 0) > before)
        wait_for(lambda: service.serving() == groups)


def test_a_gateways_death_frees_the_work_of_its_connections(service, jobs):
    running = "loraplex_engine_running_requests"
    expected = [stream(*job) for job in jobs]
    ask = {"model": BASE, "prompt": "The day was", "max_tokens": 1900, "n": 4}
    tenant = service.any_tenant
    answer = tenant.openai.completions.create(**ask, stream=True, extra_body={"ignore_eos": True})
    pieces = iter(answer)
    next(pieces)
    wait_for(lambda: sum(service.metric(running).values()) == 4)
    groups = service.serving()
    [victim] = service.processes(GATEWAY)
    victim.kill()
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        for _ in pieces:
            pass
    wait_for(lambda: is_ready(service))
    wait_for(lambda: sum(g["running"] for g in service.placement()["groups"]) == 0, 10)
    assert [stream(*job) for job in jobs] == expected
    assert service.serving() == groups
