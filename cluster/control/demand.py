"""How much each adapter is asked for: smoothed tokens/s, from the groups' cumulative counters."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...workers import EngineReport

INPUT_WEIGHT = 1.0  # of a prompt token; a generated one costs a step of its own
OUTPUT_WEIGHT = 2.0
_FORGET_BELOW = 1e-3  # weighted tokens/s


class DemandTracker:
    """Exponential moving averages of weighted tokens/s per adapter key.

    Work is added up per adapter over all groups, so a group that leaves takes no adapter's demand
    with it. Time is passed in. Base-model work is tracked like an adapter's ("tenant/base").
    """

    def __init__(self, tau_s: float) -> None:
        """`tau_s`: age at which work counts 1/e; must be above 0."""
        if tau_s <= 0:
            raise ValueError(f"tau_s is {tau_s}; it must be above 0")
        self._tau_s = tau_s
        self._last_tick: float | None = None
        self._counted: dict[str, tuple[EngineReport, dict[str, float]]] = {}
        self._new: dict[str, float] = {}
        self._rates: dict[str, float] = {}

    def observe(self, group: str, report: EngineReport) -> None:
        """Adds what `group` did since its last report.

        A group's first report is only a starting point: its counters hold work of long ago. A
        counter that went down means that the group's engine restarted and counts from zero.
        """
        work = _weighted(report)
        before = self._counted.get(group)
        self._counted[group] = (report, work)
        if before is None:
            return
        last, done = before
        restarted = report.steps < last.steps
        for key, total in work.items():
            old = 0.0 if restarted else done.get(key, 0.0)
            new = total - old if total >= old else total
            if new > 0:
                self._new[key] = self._new.get(key, 0.0) + new

    def forget_group(self, group: str) -> None:
        """A group left; if it comes back, its first report is a starting point again."""
        self._counted.pop(group, None)

    def forget_adapter(self, key: str) -> None:
        """An adapter was deleted."""
        self._new.pop(key, None)
        self._rates.pop(key, None)

    def tick(self, now_s: float) -> None:
        """Folds the work since the last tick into the averages."""
        last, self._last_tick = self._last_tick, now_s
        if last is None:
            self._new.clear()
            return
        passed = now_s - last
        if passed <= 0:
            self._last_tick = last
            return
        keep = math.exp(-passed / self._tau_s)
        new, self._new = self._new, {}
        for key in self._rates.keys() | new.keys():
            rate = keep * self._rates.get(key, 0.0) + (1 - keep) * new.get(key, 0.0) / passed
            if rate < _FORGET_BELOW:
                self._rates.pop(key, None)
            else:
                self._rates[key] = rate

    def rates(self) -> Mapping[str, float]:
        """Weighted tokens/s per key; keys that nobody asked for lately are absent."""
        return dict(self._rates)


def _weighted(report: EngineReport) -> dict[str, float]:
    work = {key: INPUT_WEIGHT * count for key, count in report.prompt_tokens.items()}
    for key, count in report.output_tokens.items():
        work[key] = work.get(key, 0.0) + OUTPUT_WEIGHT * count
    return work
