"""The limiter actor: one book of budgets for all gateways."""

from __future__ import annotations

import time
from typing import Any

from .limiter import Limiter
from .named_actors import LIMITER_NAME, start_named
from .settings import Settings

LIMITER_CPUS = 0.05


class LimiterWorker(Limiter):
    """`Limiter` on this process's clock. A restart begins with full buckets."""

    def __init__(self) -> None:
        super().__init__(time.monotonic)


def start_limiter(settings: Settings) -> Any:
    """The cluster's limiter actor, started if there is none."""
    return start_named(
        LIMITER_NAME, LimiterWorker, num_cpus=LIMITER_CPUS, resources=settings.control_resources
    )
