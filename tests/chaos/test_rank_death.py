"""A rank killed or stopped in mid-stream: streams go on elsewhere, and the group comes back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from loraplex.cluster.ports import free_port

from tests.e2e.runs import Up
from tests.e2e.service import Service, Tenant

pytestmark = [pytest.mark.soak, pytest.mark.cluster]
STREAMS, TOKENS, DEATHS = 12, 160, 3


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Up, Service]]:
    run = Up(tmp_path_factory.mktemp("chaos") / "data", free_port())
    try:
        service = Service(run.wait_ready(), run.data)
        yield run, service
        service.close()
        run.process.terminate()
        run.wait_gone()
    finally:
        run.kill_everything()


def ranks(run: Up) -> list[psutil.Process]:
    return [p for p in run.tree() if "ray::RankActor" in " ".join(p.cmdline())]


def stream(tenant: Tenant, model: str, prompt: str) -> tuple[str, int]:
    """Text and token count of a streamed completion."""
    text, tokens = "", 0
    for chunk in tenant.openai.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    ):
        text += "".join(choice.text for choice in chunk.choices)
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return text, tokens


SEEN_S = 5.0  # a stopped rank is to be found and ended by then


def kill(victim: psutil.Process) -> None:
    victim.kill()


def stop(victim: psutil.Process) -> None:
    """Stops it as a hang would, and waits until its group has ended it."""
    victim.suspend()
    victim.wait(SEEN_S)


@pytest.mark.parametrize("harm", [kill, stop])
def test_streams_survive_lost_ranks_unchanged(demo_run, harm):
    run, service = demo_run
    jobs = [
        (tenant, adapter, f"{i} The day was")
        for i, (adapter, tenant) in enumerate(list(service.owners.items()) * (STREAMS // 4))
    ]
    expected = [stream(*job) for job in jobs]
    assert all(tokens == TOKENS for _, tokens in expected)
    for death in range(DEATHS):
        alive = len(ranks(run))
        with ThreadPoolExecutor(STREAMS) as pool:
            answers = [pool.submit(stream, *job) for job in jobs]
            time.sleep(0.8)
            harm(ranks(run)[death % alive])
            assert [a.result(120) for a in answers] == expected
        run.wait_until(
            lambda alive=alive: len(ranks(run)) == alive and service.admin.get("/ready").is_success,
            "the group's return",
            90,
        )
