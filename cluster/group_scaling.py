"""How many worker groups the load asks for: Ray Serve's autoscaling, on what groups say themselves.

Serve doesn't see generation requests, which gateways send to groups directly, so its own count of
requests is always zero here. What counts is how long a new request is expected to wait.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..workers import EngineReport

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

# How much more than there is now must fit: a new group takes minutes to load its model.
_HEADROOM = 4 / 3
# Groups are taken away when those that stay would wait for less than this part of the target.
_SHRINK_BELOW = 0.5


@dataclass(frozen=True)
class Scaling:
    """
    Args:
        max_groups: at most so many; the least number is the deployment's own.
        target_wait_s: groups are added when a new request would wait for longer.
        up_after_s, down_after_s: how long the load must ask for another number of groups.
    """

    max_groups: int
    target_wait_s: float = 1.0
    up_after_s: float = 30.0
    down_after_s: float = 600.0


@dataclass(frozen=True)
class GroupWork:
    """What a group has to do, and how fast it is; Serve averages each figure over time.

    Args:
        prompt_s: seconds that the prompts take which aren't computed yet.
        open_requests: running and queued.
        rows: sequences that it decodes together.
        end_s: seconds from one request's end to the next.
    """

    prompt_s: float
    open_requests: float
    rows: float
    end_s: float

    @classmethod
    def of(cls, report: EngineReport) -> GroupWork:
        return cls(
            report.prompt_tokens_pending * report.token_s,
            report.running + report.queued,
            report.max_running,
            report.end_s,
        )

    def to_metrics(self) -> dict[str, float]:
        """For `record_autoscaling_stats`."""
        return asdict(self)


def expected_wait_s(works: Collection[GroupWork], groups: int) -> float:
    """Seconds that a new request would wait until its prompt is begun, if `groups` shared the work
    and there were `_HEADROOM` times as much of it."""
    prompts = sum(w.prompt_s for w in works) * _HEADROOM / groups
    requests = sum(w.open_requests for w in works) * _HEADROOM / groups
    ends_needed = max(0.0, requests + 1 - fmean(w.rows for w in works))
    return prompts + ends_needed * fmean(w.end_s for w in works)


def wanted_groups(works: Collection[GroupWork], now: int, target_wait_s: float, most: int) -> int:
    """The fewest groups with which a new request waits no longer than the target; fewer than `now`
    only where it would wait much less.

    Args:
        works: at least one.
        most: the answer if no fewer suffice.
    """

    def fewest(wait_s: float) -> int:
        return next((n for n in range(1, most) if expected_wait_s(works, n) <= wait_s), most)

    return max(fewest(target_wait_s), min(now, fewest(_SHRINK_BELOW * target_wait_s)))


class ByExpectedWait:
    """A policy for Ray Serve, which calls it every few seconds, keeps its answer between the least
    and the most number of replicas, and delays changes.

    Args:
        target_wait_s: see `Scaling`.
    """

    def __init__(self, target_wait_s: float) -> None:
        self._target_wait_s = target_wait_s

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        now = context.target_num_replicas
        works = _works(context.aggregated_metrics or {})
        if not works:
            return now, {}  # no group has told anything yet
        most = context.capacity_adjusted_max_replicas
        return wanted_groups(works, now, self._target_wait_s, most), {}


def _works(metrics: Mapping[str, Mapping[Any, float]]) -> list[GroupWork]:
    """Of the replicas that have told all figures."""
    columns = [metrics.get(f.name) or {} for f in fields(GroupWork)]
    replicas = [r for r in columns[0] if all(r in column for column in columns)]
    return [GroupWork(*(column[r] for column in columns)) for r in replicas]
