"""Loads, rounds and their figures, for benchmarks/gateway.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from _gateway_service import CpuClock


@dataclass(frozen=True)
class Load:
    """Streams of one round.

    Args:
        unit: what is counted: "requests" (or calls, where there is no HTTP), or "tokens".
        at_once: callers; each makes its calls one after another.
        tokens: of each answer.
        pace_us: between an engine's steps; 0: as fast as it goes.
    """

    name: str
    unit: str
    at_once: int
    calls: int
    tokens: int
    pace_us: int = 0

    @property
    def count(self) -> int:
        return self.at_once * self.calls * (self.tokens if self.unit == "tokens" else 1)


@dataclass(frozen=True)
class System:
    """One of two that are compared.

    Args:
        call: makes a load's calls; seconds of each, and seconds to each one's first token.
        near: kinds of processes before the hop; their processor time is what "per core" means.
        far: those behind it.
    """

    name: str
    call: Callable[[Load], Awaitable[tuple[list[float], list[float]]]]
    near: tuple[str, ...]
    far: tuple[str, ...]


@dataclass(frozen=True)
class Figures:
    """One system in one round.

    Attributes:
        p50_ms: of whole calls; first_p50_ms: until the first token.
        near_us: processor time before the hop for each unit; far_us: behind it.
    """

    per_s: float
    p50_ms: float
    first_p50_ms: float
    near_us: float
    far_us: float

    @property
    def per_core(self) -> float:
        return 1e6 / self.near_us


class Comparison:
    """Two systems under several loads: `run` makes a round of each, in turns."""

    def __init__(self, ours: System, other: System, loads: Sequence[Load]):
        self._systems = (ours, other)
        self._rounds: dict[Load, list[tuple[Figures, Figures]]] = {load: [] for load in loads}

    async def run(self) -> None:
        """One round. Who goes first changes from round to round."""
        for load, rounds in self._rounds.items():
            systems = self._systems[:: -1 if len(rounds) % 2 else 1]
            figures = {system.name: await _measure(system, load) for system in systems}
            ours, other = (figures[system.name] for system in self._systems)
            rounds.append((ours, other))

    def forget(self) -> None:
        """Drops the rounds that were made so far."""
        for rounds in self._rounds.values():
            rounds.clear()

    def table(self) -> str:
        ours, other = (system.name for system in self._systems)
        width = max(len(load.name) for load in self._rounds) + 2
        head = f"{'':<{width}}{'':<16}{'per core':>15}{'behind':>9}{'p50 ms':>9}{'first':>9}"
        lines = [head]
        for load, rounds in self._rounds.items():
            for i, name in enumerate((ours, other)):
                some = [pair[i] for pair in rounds]
                per_core = f"{_median(some, 'per_core'):.0f} {load.unit}/s"
                lines.append(
                    f"{load.name if i == 0 else '':<{width}}{name:<16}{per_core:>15}"
                    f"{_median(some, 'far_us'):>6.0f} us{_median(some, 'p50_ms'):>9.2f}"
                    f"{_median(some, 'first_p50_ms'):>9.2f}"
                )
            facts = self._summary(rounds)
            lines.append(
                f"{'':<{width}}{'':<16}{facts['per_core_ratio']:>14.2f}x"
                f"{'':>9}{facts['added_p50_ms']:>+9.2f}{facts['added_first_p50_ms']:>+9.2f}"
            )
        return "\n".join(lines)

    def facts(self) -> list[dict[str, Any]]:
        """For the JSON: each load, its rounds and what they come to."""
        names = [system.name for system in self._systems]
        return [
            {
                "load": vars(load),
                **self._summary(rounds),
                "rounds": {
                    name: [{k: round(v, 2) for k, v in vars(pair[i]).items()} for pair in rounds]
                    for i, name in enumerate(names)
                },
            }
            for load, rounds in self._rounds.items()
        ]

    @staticmethod
    def _summary(rounds: list[tuple[Figures, Figures]]) -> dict[str, float]:
        """Medians over the rounds of what the two were to each other within one."""

        def all_us(f: Figures) -> float:
            return f.near_us + f.far_us

        return {
            name: round(statistics.median(of(a, b) for a, b in rounds), 3)
            for name, of in {
                "per_core_ratio": lambda a, b: a.per_core / b.per_core,
                "per_core_ratio_both_sides": lambda a, b: all_us(b) / all_us(a),
                "added_p50_ms": lambda a, b: a.p50_ms - b.p50_ms,
                "added_first_p50_ms": lambda a, b: a.first_p50_ms - b.first_p50_ms,
            }.items()
        }


def _median(figures: list[Figures], name: str) -> float:
    return statistics.median(getattr(f, name) for f in figures)


async def _measure(system: System, load: Load) -> Figures:
    clock = CpuClock()
    began = time.perf_counter()
    whole, first = await system.call(load)
    seconds = time.perf_counter() - began
    cpu = clock.seconds()
    near, far = (sum(cpu[kind] for kind in kinds) for kinds in (system.near, system.far))
    return Figures(
        per_s=load.count / seconds,
        p50_ms=statistics.median(whole) * 1e3,
        first_p50_ms=statistics.median(first) * 1e3,
        near_us=near / load.count * 1e6,
        far_us=far / load.count * 1e6,
    )
