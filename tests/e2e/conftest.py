"""One running demo for all end-to-end tests that don't need one of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.e2e.oracle import Oracle
from tests.e2e.runs import Up, free_port
from tests.e2e.service import Service

# Two pools of this size don't hold the four adapters, 9.6 MB in float32, in any distribution.
POOL_BYTES = 4_600_000


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("up")
    run = Up(folder / "data", free_port(), LORAPLEX_POOL_BYTES=str(POOL_BYTES))
    try:
        service = Service(run.wait_ready(), run.data)
        yield service
        service.close()
        run.process.terminate()
        run.wait_gone()
    finally:
        run.kill_everything()


@pytest.fixture(scope="session")
def oracle() -> Callable[[str], Oracle]:
    """transformers + PEFT for an adapter's name, or for the base model's; loaded once each."""
    torch.set_num_threads(1)
    return functools.cache(Oracle)
