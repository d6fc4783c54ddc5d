"""Timing for benchmarks/moe_lora.py: CUDA graphs and events; on CPU, calls and the wall clock."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_WARM_UP = 3
_PROFILED = 5  # replays
_PAUSE_CYCLES = 20_000_000  # some 10 ms: longer than it takes to launch the first replays


class Captured:
    """Calls that run one after another: captured in one CUDA graph, or plain on CPU.

    `outputs` holds what the last replay wrote.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]], device: torch.device):
        self._calls = calls
        self._graph = None
        self.outputs = [call() for call in calls]  # compiles what isn't yet
        if device.type == "cuda":
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.outputs = [call() for call in calls]

    def replay(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self.outputs = [call() for call in self._calls]

    def __len__(self) -> int:
        return len(self._calls)


class CudaClock:
    """Spans on the device between events. All is queued behind a pause, and nothing waits in
    between, so that no span holds the host's time for a launch."""

    def spans(self, work: Sequence[Callable[[], object]]) -> list[float]:
        """Seconds of each piece of work."""
        torch.cuda._sleep(_PAUSE_CYCLES)
        events = []
        for run in work:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


class WallClock:
    def spans(self, work: Sequence[Callable[[], object]]) -> list[float]:
        """Seconds of each piece of work."""
        seconds = []
        for run in work:
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        return seconds


Clock = CudaClock | WallClock


@dataclass(frozen=True)
class Timed:
    us: float  # per call, median over replays
    spread_us: float  # between the quartiles


def time_alternating(series: Sequence[Captured], replays: int, clock: Clock) -> list[Timed]:
    """Replays all series in turn."""
    work = [one.replay for one in series] * (_WARM_UP + replays)
    seconds = clock.spans(work)[_WARM_UP * len(series) :]
    timed = []
    for index, one in enumerate(series):
        us = [span / len(one) * 1e6 for span in seconds[index :: len(series)]]
        low, median, high = statistics.quantiles(us, n=4)
        timed.append(Timed(median, high - low))
    return timed


def kernel_table(captured: Captured, device: torch.device) -> str:
    """Microseconds and launches per layer call of each kernel, the longest first."""
    if device.type != "cuda":
        return "    (no kernels on this device)"
    captured.replay()
    return kernels_of(captured.replay, _PROFILED, _PROFILED * len(captured))


def kernels_of(work: Callable[[], object], rounds: int, calls: int) -> str:
    """Microseconds and launches per call of each kernel of `work`, done `rounds` times, which are
    `calls` calls; the longest first. And how long the device was busy in all that time."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        began = time.perf_counter()
        for _ in range(rounds):
            work()
        torch.cuda.synchronize()
        wall_us = (time.perf_counter() - began) * 1e6
    us: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in profile.events() or ():
        if event.device_type.name == "CUDA":
            us[event.name] += event.time_range.elapsed_us()
            launches[event.name] += 1
    lines = [
        f"    {total / calls:9.2f} us {launches[name] / calls:6.2f} x  {name[:80]}"
        for name, total in us.most_common()
    ]
    whole = f"    {us.total() / calls:9.2f} us in all, of {wall_us / calls:.2f} us by the wall"
    return "\n".join([*lines, whole])
