"""What one tenant's flood costs the others: the same trace with its requests, and without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .hardware import Hardware
from .scenarios import POLICIES, make_policy
from .simulation import simulate
from .summary import quantile
from .trace import Trace

ABUSE_POLICIES = (POLICIES[0], "loraplex-fcfs", *POLICIES[1:])
ABUSER = "t000"  # who floods in generated traces


@dataclass(frozen=True)
class Service:
    """What the other tenants get: output tokens/s, and seconds to the first token."""

    tokens_s: float
    p50_ttft_s: float
    p99_ttft_s: float


@dataclass(frozen=True)
class Abuse:
    """The other tenants' service under one policy, without the abuser and beside it."""

    policy: str
    without: Service
    beside: Service

    @property
    def throughput(self) -> float:
        """Share of their tokens/s that they keep."""
        return self.beside.tokens_s / self.without.tokens_s if self.without.tokens_s else 1.0

    @property
    def p99_times(self) -> float:
        """How many times as long their p99 takes."""
        alone = self.without.p99_ttft_s
        return self.beside.p99_ttft_s / alone if alone else 1.0


def compare_abuse(
    trace: Trace,
    abuser: str,
    groups: int,
    warmup_s: float,
    seed: int,
    policies: Sequence[str] = ABUSE_POLICIES,
    hardware: Hardware | None = None,
) -> list[Abuse]:
    """Two runs a policy.

    Tokens are those of requests that ended between the warm-up's end and the last arrival; times
    are those of all that came in between, until they were served.

    Args:
        abuser: the tenant whose requests are left out of the first run.
        policies: of `POLICIES`, or "loraplex-fcfs": the live policy's, in groups that serve
            requests as they come.
    """
    hardware = hardware or Hardware()
    others = replace(trace, requests=tuple(r for r in trace.requests if r.tenant != abuser))
    until_s = trace.requests[-1].at_s if trace.requests else 0.0

    def service(trace: Trace, policy: str) -> Service:
        chosen = make_policy(policy, trace, hardware, seed)
        outcome = simulate(trace, chosen, groups, hardware, warmup_s)
        served = [s for s in outcome.served if s.tenant != abuser]
        times = sorted(s.ttft_s for s in served if s.at_s >= warmup_s)
        tokens = sum(s.output_tokens for s in served if warmup_s <= s.end_s <= until_s)
        span = until_s - warmup_s
        return Service(
            round(tokens / span, 1) if span > 0 else 0.0,
            round(quantile(times, 0.5), 4),
            round(quantile(times, 0.99), 4),
        )

    return [Abuse(p, service(others, p), service(trace, p)) for p in policies]
