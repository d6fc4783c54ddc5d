"""One running demo for all end-to-end tests that don't need one of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import ExitStack

import pytest
import torch
from loraplex.cluster.ports import free_port

from tests.e2e.oracle import Oracle
from tests.e2e.runs import Up
from tests.e2e.service import Service

# Two pools of this size don't hold the four adapters, 9.6 MB in float32, in any distribution.
POOL_BYTES = 4_600_000

_RUNNING = pytest.StashKey[ExitStack]()
_LAST = pytest.StashKey[bool]()


@pytest.fixture(scope="session")
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Service]:
    folder = tmp_path_factory.mktemp("up")
    with ExitStack() as stack:
        run = Up(folder / "data", free_port(), LORAPLEX_POOL_BYTES=str(POOL_BYTES))
        stack.callback(run.kill_everything)
        service = Service(run.wait_ready(), run.data, run.process.pid)
        stack.callback(run.wait_gone)
        stack.callback(run.process.terminate)
        stack.callback(service.close)
        request.session.stash[_RUNNING] = stack
        yield service


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    users = [item for item in items if "service" in getattr(item, "fixturenames", ())]
    if users:
        users[-1].stash[_LAST] = True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """Ends the demo after the last test that uses it, not beside all the tests that follow."""
    yield
    if item.stash.get(_LAST, False) and _RUNNING in item.session.stash:
        item.session.stash[_RUNNING].close()


@pytest.fixture(scope="session")
def oracle() -> Callable[[str], Oracle]:
    """transformers + PEFT for an adapter's name, or for the base model's; loaded once each."""
    torch.set_num_threads(1)
    return functools.cache(Oracle)
