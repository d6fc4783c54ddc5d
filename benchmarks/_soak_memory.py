"""Memory of a service's processes over time, for benchmarks/soak.py."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import psutil
from idle_memory import kind_of


@dataclass
class Usage:
    """One process: bytes of PSS and RSS at each look."""

    kind: str
    pss: list[int] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """Bytes of PSS between the two ends of what follows the first third: medians of a quarter
        of it each."""
        return growth(self.pss)


def growth(values: list[int]) -> float:
    """See `Usage.growth`."""
    warm = values[len(values) // 3 :]
    quarter = max(1, len(warm) // 4)
    return statistics.median(warm[-quarter:]) - statistics.median(warm[:quarter])


class Memory:
    """Looks at a process and all below it."""

    def __init__(self, root: psutil.Process) -> None:
        self._root = root
        self._looks = 0
        self._by_pid: dict[int, Usage] = {}

    def look(self) -> None:
        for process in [self._root, *self._root.children(recursive=True)]:
            try:
                found = process.memory_full_info()
                if process.pid not in self._by_pid:
                    self._by_pid[process.pid] = Usage(kind_of(process))
            except psutil.Error:  # it has ended
                continue
            self._by_pid[process.pid].pss.append(found.pss)
            self._by_pid[process.pid].rss.append(found.rss)
        self._looks += 1

    def throughout(self) -> list[Usage]:
        """Processes that were there at every look."""
        return [u for u in self._by_pid.values() if len(u.pss) == self._looks]

    def passing(self) -> list[str]:
        """Kinds of those that weren't."""
        return [u.kind for u in self._by_pid.values() if len(u.pss) < self._looks]
