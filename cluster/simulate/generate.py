"""Traces out of a few parameters and a seed.

Popularity is either Zipf's, weight (i + 1)^-s for the i-th adapter, or S-LoRA's power: the index
is floor(n * u) with u drawn as `numpy.random.power(alpha)`, whose density is alpha * u^(alpha-1),
so alpha 1 is uniform and a small alpha is skewed. (Here its exact weights are used,
((i + 1) / n)^alpha - (i / n)^alpha.) Every adapter's arrivals are a renewal process of their own
with gamma-distributed gaps (shape 1 / cv^2; cv 1 is Poisson), as in S-LoRA's workloads. Prompt and
output lengths are lognormal. All draws are Python's `random.Random(seed)`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from .trace import Fault, Trace, TracedAdapter, TracedRequest, in_order

RANK_16_BYTES = 1_694_498_816  # in a pool; benchmarks/results/cpu-2core/pool.json
_DRIFT_S = 20.0  # popularity moves on by so much at a time


@dataclass(frozen=True)
class Workload:
    """
    Args:
        rate: requests/s, of all adapters.
        zipf: Zipf's s; used unless `power` is set.
        power: S-LoRA's alpha.
        cv: coefficient of variation of each adapter's gaps.
        ranks: (rank, share of the adapters) pairs.
        rank_16_bytes: of an adapter of rank 16; others in proportion.
        tenants: adapters are dealt out to them in turn.
        base_share: of the requests, for the base model.
        alternate_s: the two halves of the adapters take turns of so many seconds; 0: they don't.
        drift: places by which popularity moves on in every 20 s.
        flash: (from s, until s, share): one unpopular adapter gets that share of the rate on top.
        abuse: (from s, until s, times): tenant 0 sends so many times its share.
        deaths: (at s, group) pairs; a dead group is back after 60 s.
        prompt_tokens, output_tokens: means; the longest are 8 times that.
        prefixes, prefix_tokens: prompts of one adapter begin with one of so many texts.
    """

    name: str
    adapters: int
    rate: float
    duration_s: float
    zipf: float = 1.0
    power: float | None = None
    cv: float = 1.0
    ranks: tuple[tuple[int, float], ...] = ((16, 1.0),)
    rank_16_bytes: int = RANK_16_BYTES
    tenants: int = 16
    base_share: float = 0.0
    alternate_s: float = 0.0
    drift: int = 0
    flash: tuple[float, float, float] | None = None
    abuse: tuple[float, float, float] | None = None
    deaths: tuple[tuple[float, int], ...] = ()
    prompt_tokens: int = 512
    output_tokens: int = 128
    prefixes: int = 4
    prefix_tokens: int = 128


def generate(work: Workload, seed: int) -> Trace:
    """A trace; equal arguments give equal traces."""
    rng = random.Random(seed)
    adapters = _adapters(work, rng)
    weights = popularity(work)
    spots = list(range(work.adapters))
    rng.shuffle(spots)  # popularity has nothing to do with names or ranks
    requests: list[TracedRequest] = []
    edges = _edges(work)
    for start, end in pairwise(edges):
        rates = _rates(work, weights, spots, adapters, start)
        for adapter, rate in zip(adapters, rates, strict=True):
            for at_s in _arrivals(rng, rate, work.cv, start, end):
                requests.append(_request(work, rng, adapter, at_s))
    if work.base_share:
        rate = work.rate * work.base_share
        base = TracedAdapter("base/", 0)
        for at_s in _arrivals(rng, rate, work.cv, 0.0, work.duration_s):
            requests.append(_request(work, rng, base, at_s))
    faults = tuple(Fault(at_s, group) for at_s, group in work.deaths)
    settings = {"workload": asdict(work), "seed": seed}
    return Trace(tuple(adapters), in_order(requests), faults, settings)


def popularity(work: Workload) -> list[float]:
    """Shares of the adapters' requests, the most popular first; they add up to 1."""
    n = work.adapters
    if work.power is not None:
        return [((i + 1) / n) ** work.power - (i / n) ** work.power for i in range(n)]
    weights = [(i + 1) ** -work.zipf for i in range(n)]
    total = sum(weights)
    return [w / total for w in weights]


def _adapters(work: Workload, rng: random.Random) -> list[TracedAdapter]:
    ranks, shares = zip(*work.ranks, strict=True)
    drawn = rng.choices(ranks, shares, k=work.adapters)
    return [
        TracedAdapter(f"t{i % work.tenants:03d}/{i:06d}", work.rank_16_bytes * rank // 16, rank)
        for i, rank in enumerate(drawn)
    ]


def _edges(work: Workload) -> list[float]:
    """Times between which the rates stay as they are."""
    edges = {0.0, work.duration_s}
    for step in (work.alternate_s, _DRIFT_S if work.drift else 0.0):
        if step:
            edges.update(i * step for i in range(1, math.ceil(work.duration_s / step)))
    for phase in (work.flash, work.abuse):
        if phase:
            edges.update(phase[:2])
    return sorted(e for e in edges if 0 <= e <= work.duration_s)


def _rates(
    work: Workload,
    weights: Sequence[float],
    spots: Sequence[int],
    adapters: Sequence[TracedAdapter],
    at_s: float,
) -> list[float]:
    """Requests/s of every adapter from `at_s` on."""
    n = work.adapters
    total = work.rate * (1 - work.base_share)
    moved = work.drift * int(at_s / _DRIFT_S)
    rates = [total * weights[(spot + moved) % n] for spot in spots]
    if work.alternate_s:
        turn = int(at_s / work.alternate_s) % 2
        rates = [2 * r if i % 2 == turn else 0.0 for i, r in enumerate(rates)]
    if work.flash and work.flash[0] <= at_s < work.flash[1]:
        rates[spots.index(3 * n // 4)] += total * work.flash[2]
    if work.abuse and work.abuse[0] <= at_s < work.abuse[1]:
        rates = [
            r * work.abuse[2] if a.tenant == "t000" else r
            for r, a in zip(rates, adapters, strict=True)
        ]
    return rates


def _arrivals(rng: random.Random, rate: float, cv: float, start: float, end: float) -> list[float]:
    if rate <= 0:
        return []
    shape = 1 / cv**2
    scale = 1 / (rate * shape)
    times = []
    at_s = start + rng.random() * rng.gammavariate(shape, scale)
    while at_s < end:
        times.append(at_s)
        at_s += rng.gammavariate(shape, scale)
    return times


def _request(
    work: Workload, rng: random.Random, adapter: TracedAdapter, at_s: float
) -> TracedRequest:
    return TracedRequest(
        at_s,
        adapter.tenant,
        adapter.key if adapter.nbytes else None,
        work.prefix_tokens + _length(rng, work.prompt_tokens - work.prefix_tokens),
        _length(rng, work.output_tokens),
        rng.randrange(work.prefixes),
        work.prefix_tokens,
    )


def _length(rng: random.Random, mean: int) -> int:
    """Lognormal with sigma 0.8, from 1 to 8 times the mean."""
    drawn = rng.lognormvariate(math.log(mean) - 0.32, 0.8)
    return max(1, min(8 * mean, round(drawn)))
