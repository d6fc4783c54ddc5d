"""What one tenant at ten times its share costs the others: the scheduler on steps of modelled time.

    python benchmarks/fairness.py

The scheduler, its queue and its KV blocks are the engine's own; only the model is left out. A step
takes what 48 layers of Qwen3-30B-A3B's MoE with LoRA take on an H100 for as many tokens (the
design's table, between whose points times are taken as linear): a busy machine changes nothing
here, and nothing here says how fast this machine is.

Eight tenants of equal weight, each with an adapter of its own. Seven ask for a given part of their
fair share, an eighth of what the group does when all wait; arrivals are Poisson. They are measured
with the eighth away, and with it asking for ten times its share. p99s are over all requests of
the seven. Then all eight ask for too much, in requests of different sizes, and the gap between what
was done for any two is held against the bound (`workers/fairness.py`).
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from loraplex.workers import AdapterRef, GenerationRequest, SamplingParams
from loraplex.workers.fairness import Prices
from loraplex.workers.kv_blocks import KVBlocks
from loraplex.workers.scheduler import Scheduler
from loraplex.workers.sequence import Sequence

TENANTS = 8
ABUSER = "t7"
RANK = 16
LAYERS = 48
LAYER_US = ((1, 51), (8, 208), (32, 396), (64, 467), (256, 642), (8192, 2989))  # tokens, us
MAX_RUNNING, MAX_BATCH_TOKENS, SLACK = 64, 512, 8192.0
KV_TOKENS, BLOCK = 1 << 16, 16
PROMPT, ANSWER = (64, 512), (32, 256)  # tokens, from and to


@dataclass(frozen=True)
class Sizes:
    """From and to how many tokens a tenant's requests have, evenly drawn."""

    prompt: tuple[int, int] = PROMPT
    answer: tuple[int, int] = ANSWER

    @property
    def price(self) -> float:
        """Of a request, on average."""
        prompt, answer = (round(statistics.mean(x)) for x in (self.prompt, self.answer))
        return Prices().tokens(prompt, answer, RANK)


class Adapters:
    """A pool that has room for every adapter."""

    def __init__(self) -> None:
        self._slots: dict[str, int] = {}

    def want(self, ref: AdapterRef) -> None:
        pass

    def acquire(self, ref: AdapterRef, tokens: int) -> tuple[int, str]:
        return self._slots.setdefault(ref.key, len(self._slots)), "gpu"

    def release(self, slot: int, drop: bool) -> None:
        pass

    def size(self, slot: int) -> tuple[int, int]:
        return 0, RANK


@dataclass
class Done:
    """One request: seconds of modelled time, and steps."""

    tenant: str
    first_s: float  # from its arrival to its first token
    first_steps: int
    total_s: float
    total_steps: int
    tokens: int


@dataclass
class Group:
    """A worker group without a model."""

    seconds: float = 0.0
    steps: int = 0
    done: list[Done] = field(default_factory=list)
    arrivals: int = 0

    def __post_init__(self) -> None:
        kv = KVBlocks(KV_TOKENS // BLOCK, BLOCK)
        residency: Any = Adapters()
        self.scheduler = Scheduler(kv, residency, MAX_BATCH_TOKENS, MAX_RUNNING, SLACK)
        self._open: dict[Sequence, list[float]] = {}  # arrival, steps then, first token, steps

    def submit(self, tenant: str, prompt: tuple[int, ...], answer: int, at: float) -> None:
        params = SamplingParams(max_tokens=answer)
        ref = AdapterRef(tenant, "0" * 64)
        request = GenerationRequest(str(self.arrivals), prompt, params, tenant, ref)
        seq = Sequence(request, self.arrivals, len(prompt) + answer)
        self.arrivals += 1
        self._open[seq] = [at, self.steps]
        self.scheduler.add(seq)

    def step(self) -> None:
        """One step; an idle one takes no time."""
        work, refusals = self.scheduler.schedule(self.seconds)
        assert not refusals
        if not work:
            return
        self.seconds += step_seconds(sum(w.count for w in work))
        self.steps += 1
        for w in work:
            self.scheduler.launched(w)
            self.scheduler.landed(w)
            seq = w.seq
            if seq.pending:
                continue
            seq.tokens.append(0)
            times = self._open[seq]
            if len(times) == 2:
                times += [self.seconds, self.steps]
            if seq.length >= seq.limit:
                self.scheduler.remove(seq)
                at, steps, first, first_steps = self._open.pop(seq)
                first_steps = round(first_steps - steps)
                total = self.seconds - at
                tenant, tokens = seq.request.tenant_id, seq.output_count
                taken = round(self.steps - steps)
                self.done.append(Done(tenant, first - at, first_steps, total, taken, tokens))


def step_seconds(tokens: int) -> float:
    (t0, us0), (t1, us1) = next(p for p in pairwise(LAYER_US) if tokens <= p[1][0])
    return LAYERS * (us0 + (us1 - us0) * (tokens - t0) / (t1 - t0)) / 1e6


def prompt_of(rng: random.Random, sizes: Sizes) -> tuple[int, ...]:
    """No two begin alike: no prefix is found again."""
    return tuple(rng.randrange(1 << 30) for _ in range(rng.randint(*sizes.prompt)))


def capacity(seed: int) -> float:
    """Price of what is done in a second when all tenants wait all the time."""
    group, rng, sizes = Group(), random.Random(seed), Sizes()
    while group.steps < 3000:
        waiting = group.scheduler.waiting.by_tenant()
        for t in (f"t{i}" for i in range(TENANTS)):
            for _ in range(4 - waiting.get(t, 0)):
                group.submit(t, prompt_of(rng, sizes), rng.randint(*sizes.answer), group.seconds)
        group.step()
    return group.scheduler.vtc.total / group.seconds


def serve(rates: dict[str, float], seconds: float, seed: int) -> Group:
    """Poisson arrivals at so many requests a second of each tenant."""
    group, sizes = Group(), Sizes()
    arrivals: list[tuple[float, str, tuple[int, ...], int]] = []
    for tenant, rate in rates.items():
        rng = random.Random(f"{seed}/{tenant}")  # the same with and without the others
        at = rng.expovariate(rate)
        while at < seconds:
            arrivals.append((at, tenant, prompt_of(rng, sizes), rng.randint(*sizes.answer)))
            at += rng.expovariate(rate)
    arrivals.sort(key=lambda a: a[0])
    i = 0
    while group.seconds < seconds:
        while i < len(arrivals) and arrivals[i][0] <= group.seconds:
            at, tenant, prompt, answer = arrivals[i]
            group.submit(tenant, prompt, answer, at)
            i += 1
        before = group.seconds
        group.step()
        if group.seconds == before:
            group.seconds = arrivals[i][0] if i < len(arrivals) else seconds
    return group


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


def others(group: Group) -> dict[str, float]:
    mine = [d for d in group.done if d.tenant != ABUSER]
    return {
        "requests": len(mine),
        "tokens_per_s": round(sum(d.tokens for d in mine) / group.seconds, 1),
        "first_token_p50_ms": round(1e3 * statistics.median(d.first_s for d in mine), 2),
        "first_token_p99_ms": round(1e3 * p99([d.first_s for d in mine]), 2),
        "first_token_p99_steps": p99([d.first_steps for d in mine]),
        "answer_p99_ms": round(1e3 * p99([d.total_s for d in mine]), 1),
        "answer_p99_steps": p99([d.total_steps for d in mine]),
    }


def isolation(share: float, rate: float, seconds: float, seed: int) -> dict[str, Any]:
    """The seven at `share` of their fair share (`rate` requests a second), without and with."""
    rates = {f"t{i}": share * rate for i in range(TENANTS - 1)}
    alone = others(serve(rates, seconds, seed))
    beside = others(serve({**rates, ABUSER: 10 * rate}, seconds, seed))
    ratios = {name: round(beside[name] / alone[name], 3) for name in alone}
    return {"without": alone, "beside_10x": beside, "ratio": ratios}


def gaps(steps: int, seed: int) -> dict[str, Any]:
    """All tenants wait all the time, with requests of their own sizes and weights."""
    group, rng = Group(), random.Random(seed)
    sizes = {f"t{i}": Sizes((8 << i, 16 << i), (4 << (7 - i), 8 << (7 - i))) for i in range(8)}
    vtc = group.scheduler.vtc
    done: dict[str, float] = defaultdict(float)
    charge = vtc.charge

    def counting(tenant: str, price: float, weight: float) -> None:
        done[tenant] += price / weight
        charge(tenant, price, weight)

    vtc.charge = counting  # type: ignore[method-assign]
    spans: dict[tuple[str, str], tuple[float, float]] = {}
    for _ in range(steps):
        waiting = group.scheduler.waiting.by_tenant()
        for t, size in sizes.items():
            for _ in range(MAX_RUNNING + 1 - waiting.get(t, 0)):
                group.submit(t, prompt_of(rng, size), rng.randint(*size.answer), group.seconds)
        group.step()
        for f in sizes:
            for g in sizes:
                ahead = done[f] - done[g]
                low, high = spans.get((f, g), (ahead, ahead))
                spans[f, g] = min(low, ahead), max(high, ahead)
    longest = max(s.prompt[1] + Prices().output * s.answer[1] for s in sizes.values())
    most = MAX_RUNNING * longest * (1 + Prices().rank * RANK)
    gap = max(high - low for low, high in spans.values())
    total = [done[t] for t in sizes]
    return {
        "steps": steps,
        "largest_gap": round(gap),
        "bound": round(2 * (most + SLACK)),
        "least_to_most_served": round(min(total) / max(total), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=240.0, help="of modelled time, each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machine", default="cpu-2core", help="folder of the result")
    args = parser.parse_args()
    most = capacity(args.seed)
    rate = most / TENANTS / Sizes().price
    result: dict[str, Any] = {
        "machine": args.machine,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "loraplex": version("loraplex")},
        "times": "modelled, not measured",
        "modelled_seconds": args.seconds,
        "seed": args.seed,
        "tenants": TENANTS,
        "fair_share_requests_per_s": round(rate, 3),
        "capacity_price_per_s": round(most),
    }
    for share in (0.3, 0.5, 0.8):
        row = isolation(share, rate, args.seconds, args.seed)
        result[f"others at {share:g} of their share"] = row
        print(f"others at {share:g} of their share: {json.dumps(row['ratio'])}", flush=True)
        print(f"  {json.dumps(row['without'])}\n  {json.dumps(row['beside_10x'])}")
    result["all wait"] = gaps(6000, args.seed)
    print(f"all wait: {json.dumps(result['all wait'])}")
    path = Path(__file__).parent / "results" / args.machine / "fairness.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
