"""Latencies and the table of benchmarks/serving_gpu.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

BAR = 0.90


def latencies(streams: Sequence[tuple[float, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """p50 and p99 in milliseconds, over all streams.

    Args:
        streams: when each was sent, and when each of its events came.

    Returns:
        ttft: to the first event. itl: from one event to the next; those that came in one piece
        count as 0. tpot: a stream's mean of them.
    """
    found = {
        "ttft": [events[0] - sent for sent, events in streams],
        "itl": [b - a for _, events in streams for a, b in pairwise(events)],
        "tpot": [(events[-1] - events[0]) / (len(events) - 1) for _, events in streams],
    }
    return {name: _percentiles(times) for name, times in found.items()}


def _percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{q}": round(cuts[q - 1] * 1e3, 2) for q in (50, 99)}


def rates(name: str, values: list[float]) -> str:
    median = statistics.median(values)
    return f"{name:<26}{median:8.0f} tokens/s  ({min(values):.0f} to {max(values):.0f})"


def show(result: dict[str, Any]) -> None:
    engine = result["engine_alone"]
    print(f"\n{result['machine']}, {result['cpus']} cores, {result['versions']}")
    _show_one("engine alone", engine)
    print(f"  kernels compiled after ready: {engine['compiles_after_ready']}")
    for front, figures in result["service"].items():
        _show_one(f"HTTP by {front}", figures)
        print(f"  share {figures['share']:.1%}, the bar is {BAR:.0%}")
        inside = figures["engine"]
        print(
            f"  its engine: {inside['tokens_s_in_steps']:.0f} tokens/s in {inside['steps']:.0f} "
            f"steps, {inside['share_of_time_in_steps']:.1%} of the time; kernels compiled after "
            f"ready: {inside['late_compiles']:.0f}"
        )
        print(f"  events in one read: {figures['events_per_read']:.2f}")
        print("  cores in use:", ", ".join(f"{k} {v:.2f}" for k, v in figures["cores"].items()))
    phases = result["phases_s"]
    print("seconds:", ", ".join(f"{name} {s:.0f}" for name, s in phases.items()), end="")
    print(f"; {sum(phases.values()):.0f} in all")


def _show_one(name: str, figures: dict[str, Any]) -> None:
    print(rates(name, figures["tokens_s"]))
    times = figures["latency_ms"].items()
    parts = (f"{kind.upper()} p50 {ms['p50']:.2f}, p99 {ms['p99']:.2f}" for kind, ms in times)
    print("  ms:", "; ".join(parts))
