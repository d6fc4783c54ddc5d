"""What a run's figures are: latency, service to the adapters that get the worst, bytes moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .simulation import Outcome, Served

SLO_TTFT_S = 1.0


@dataclass(frozen=True)
class Summary:
    """
    Args:
        p50_ttft_s, p99_ttft_s, max_ttft_s: seconds to the first token.
        slo_worst_decile: share of requests with their first token within the SLO, of the tenth of
            the adapters for which it is lowest (each adapter counts alike).
        slo: the same of all requests.
        gpu_gb: copied into pools. disk_gb: read from disks. s3_gb: fetched from the store.
    """

    policy: str
    requests: int
    p50_ttft_s: float
    p99_ttft_s: float
    max_ttft_s: float
    slo: float
    slo_worst_decile: float
    output_tokens_s: float
    gpu_gb: float
    disk_gb: float
    s3_gb: float


def summarize(outcome: Outcome, warmup_s: float = 0.0, slo_s: float = SLO_TTFT_S) -> Summary:
    """Figures over the requests that came after the warm-up."""
    served = [s for s in outcome.served if s.at_s >= warmup_s]
    times = sorted(s.ttft_s for s in served)
    span = max((s.end_s for s in served), default=0.0) - warmup_s
    gb = {tier: round(n / 1e9, 1) for tier, n in outcome.moved.items()}
    return Summary(
        policy=outcome.policy,
        requests=len(served),
        p50_ttft_s=round(quantile(times, 0.5), 4),
        p99_ttft_s=round(quantile(times, 0.99), 4),
        max_ttft_s=round(quantile(times, 1.0), 4),
        slo=round(sum(t <= slo_s for t in times) / max(1, len(times)), 4),
        slo_worst_decile=round(_worst_decile(served, slo_s), 4),
        output_tokens_s=round(sum(s.output_tokens for s in served) / span, 1) if span > 0 else 0.0,
        gpu_gb=gb["gpu"],
        disk_gb=gb["disk"],
        s3_gb=gb["s3"],
    )


def quantile(ordered: Sequence[float], q: float) -> float:
    """The smallest value that at least a share `q` of the values don't exceed; 0 without any."""
    if not ordered:
        return 0.0
    return ordered[max(0, -(-int(q * 1000) * len(ordered) // 1000) - 1)]


def _worst_decile(served: Sequence[Served], slo_s: float) -> float:
    by_adapter: dict[str, list[bool]] = {}
    for s in served:
        by_adapter.setdefault(s.adapter or "base", []).append(s.ttft_s <= slo_s)
    shares = sorted(sum(met) / len(met) for met in by_adapter.values())
    worst = shares[: max(1, len(shares) // 10)]
    return sum(worst) / len(worst) if worst else 1.0
