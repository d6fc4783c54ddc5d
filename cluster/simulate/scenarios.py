"""The scenarios that are published, and what is compared on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .baselines import HashLru, RayMultiplex, TwoChoices
from .dynamo import Dynamo
from .generate import Workload
from .hardware import Hardware
from .loraplex import Loraplex
from .policy import Policy
from .simulation import simulate
from .summary import SLO_TTFT_S, Summary, summarize
from .trace import Trace

POLICIES = ("loraplex", "hash", "ray", "p2c", "dynamo")
_SHARED_OUTER_RANK_16_BYTES = 490_733_568  # benchmarks/results/cpu-2core/pool.json
_MIXED_RANKS = ((8, 0.4), (16, 0.4), (32, 0.2))


@dataclass(frozen=True)
class Scenario:
    """Figures count what comes, and what moves, after `warmup_s`."""

    work: Workload
    groups: int
    warmup_s: float


def _small(name: str, **changes) -> Scenario:
    """8 groups with pools for 4 adapters, 32 adapters."""
    work = Workload(name, adapters=32, rate=40.0, duration_s=240.0)
    return Scenario(replace(work, **changes), groups=8, warmup_s=60.0)


def _large(name: str, **changes) -> Scenario:
    """64 groups, 2,000 adapters of mixed ranks with shared outer factors; about 14 fit a pool."""
    work = Workload(
        name,
        adapters=2000,
        rate=160.0,
        duration_s=150.0,
        ranks=_MIXED_RANKS,
        rank_16_bytes=_SHARED_OUTER_RANK_16_BYTES,
        tenants=100,
    )
    return Scenario(replace(work, **changes), groups=64, warmup_s=60.0)


def _abusive(name: str, groups: int, adapters: int) -> Scenario:
    """Eight tenants who ask for half of their fair share; after the warm-up, the first one asks for
    ten times that share. (A group serves some 17 requests/s; its pool holds 13 adapters.)"""
    work = Workload(
        name,
        adapters=adapters,
        rate=8.75 * groups,
        duration_s=180.0,
        zipf=0.0,
        rank_16_bytes=_SHARED_OUTER_RANK_16_BYTES,
        tenants=8,
        abuse=(60.0, 180.0, 20.0),
    )
    return Scenario(work, groups, warmup_s=60.0)


SCENARIOS = {
    s.work.name: s
    for s in (
        _small("zipf-0", zipf=0.0),
        _small("zipf-0.6", zipf=0.6),
        _small("zipf-1", zipf=1.0),
        _small("zipf-1.5", zipf=1.5),
        _small("power-0.1", power=0.1),
        _small("power-0.3", power=0.3),
        _small("power-0.6", power=0.6),
        _small("power-1", power=1.0),
        _small("alternating", zipf=0.6, alternate_s=30.0),
        _small("cv-4", cv=4.0),
        _small("cv-8", cv=8.0),
        _small("rank-mix", ranks=_MIXED_RANKS),
        _small("drift", drift=4),
        _small("flash-crowd", flash=(100.0, 160.0, 0.5)),
        _small("group-death", deaths=((120.0, 3),)),
        _small("abuse", abuse=(100.0, 160.0, 10.0)),
        _abusive("abusive", groups=8, adapters=32),
        _abusive("abusive-group", groups=1, adapters=8),
        _large("large-zipf-1", zipf=1.0),
        _large("large-zipf-1.5", zipf=1.5),
        _large("large-alternating", zipf=1.0, alternate_s=30.0),
    )
}


def slots_of(trace: Trace, hardware: Hardware) -> int:
    """Mean adapters that a pool holds."""
    sizes = [a.nbytes for a in trace.adapters]
    return max(1, int(hardware.pool_bytes * len(sizes) / max(1, sum(sizes))))


def make_policy(name: str, trace: Trace, hardware: Hardware, seed: int) -> Policy:
    """A fresh policy; its draws, if it makes any, come from `seed`.

    Raises:
        ValueError: there is none of this name.
    """
    makers: dict[str, Callable[[], Policy]] = {
        "loraplex": Loraplex,
        "loraplex-fcfs": lambda: Loraplex(fair=False),
        "hash": HashLru,
        "ray": lambda: RayMultiplex(seed),
        "p2c": lambda: TwoChoices(seed),
        "dynamo": lambda: Dynamo(slots_of(trace, hardware)),
    }
    if name not in makers:
        raise ValueError(f"no policy is called {name!r}; there are {', '.join(makers)}")
    return makers[name]()


def compare(
    trace: Trace,
    groups: int,
    warmup_s: float,
    seed: int,
    policies: Sequence[str] = POLICIES,
    hardware: Hardware | None = None,
    slo_s: float = SLO_TTFT_S,
) -> list[Summary]:
    """One run a policy, on the same trace and hardware."""
    hardware = hardware or Hardware()
    return [
        summarize(
            simulate(trace, make_policy(p, trace, hardware, seed), groups, hardware, warmup_s),
            warmup_s,
            slo_s,
        )
        for p in policies
    ]
