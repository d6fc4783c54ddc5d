"""How many worker groups the load asks for: Ray Serve's autoscaling, on what groups say themselves.

Serve doesn't see generation requests, which gateways send to groups directly, so its own count of
requests is always zero here.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

METRIC = "open_sequences"  # running and queued in a group
# Of the sequences that a group decodes together, how many it should have open: a new group takes
# minutes to load its model, and the rest is for what comes meanwhile.
TARGET_FILL = 0.75


def wanted_groups(open_sequences: Collection[float], target: float) -> int:
    """Groups with which each would have at most `target` sequences open; at least one."""
    return max(1, math.ceil(sum(open_sequences) / target))


class ByOpenSequences:
    """A policy for Ray Serve, which calls it every few seconds, keeps its answer between the least
    and the most number of replicas, and delays changes.

    Args:
        target: open sequences of a group.
    """

    def __init__(self, target: float) -> None:
        self._target = target

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        seen = (context.aggregated_metrics or {}).get(METRIC)
        if not seen:
            return context.target_num_replicas, {}  # no group has told anything yet
        return wanted_groups(seen.values(), self._target), {}
