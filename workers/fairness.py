"""Virtual Token Counters: which tenant is served next, and how far ahead of another it can get.

After "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024), with weights, prices of
adapters, a slack, and prompts that are paid for chunk by chunk.

A tenant's counter is the price of the work done for it, divided by its weight. Who has the lowest
counter of those that wait comes next. A tenant that comes back is lifted to the lowest counter of
those that wait (to that of the tenant admitted last, where nobody waits), less a bounded credit: it
may begin with a burst if it used less than its share before, and that is all that time without
requests earns.

The bound. A tenant is *active* while it has a request that could start: one that waits for its
adapter to come to this node can't. Let `slack` be how far above the lowest active counter a tenant
may stand when one of its requests is admitted, and U the most that all of one tenant's running
requests can still be charged right after an admission, over its weight: at most

    (max_running * (longest prompt + output price * longest answer) * (1 + rank price * rank)
     + load price * largest adapter) / weight.

For tenants f and g, both active all through any stretch of time, the work W done for them in it
differs by

    | W_f / weight_f - W_g / weight_g |  <=  2 (U + slack + credit).

Proof. `floor` is the highest that the lowest active counter has been at a join or an admission; it
never falls. Who joins is lifted to the floor less the credit, at least, and counters never fall: so
(1) active counters are at least floor - credit. A counter grows by admissions and by running
requests. Just before its last admission it was at most the lowest active one + slack, which is at
most floor + slack from then on, and since then it grew by U at most: (2) every counter is at most
floor + slack + U. By (1) and (2) two active counters differ by U + slack + credit at most, at the
beginning of the stretch and at its end. In between neither was lifted, since lifts come with
joining, so each grew by W / weight. []

Requests are never taken off for being ahead, so U counts all that runs. One tenant's share of what
runs is small where others wait: what is measured is far below the bound (benchmarks/fairness.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_SWEEP_FROM = 256  # tenants remembered before the first look for some to forget


@dataclass(frozen=True)
class Prices:
    """What work costs; the unit is one input token of the base model.

    Attributes:
        output: of an output token.
        rank: added to the price of each token, as a share of it, for each unit of the adapter's
            rank. At rank 16 a step costs 1.12 times the base model's (H100, 32 tokens of as many
            adapters: DESIGN's table).
        load_byte: of a byte loaded to the pool. A GPU that prefills 10,000 tokens a second and
            copies 50 GB/s moves 5 MB in a token's time.
    """

    output: float = 2.0
    rank: float = 1 / 128
    load_byte: float = 1 / (4 << 20)

    def tokens(self, inputs: int, outputs: int, rank: int) -> float:
        """Of tokens that go through an adapter of this rank; 0: the base model."""
        return (inputs + self.output * outputs) * (1 + self.rank * rank)

    def load(self, nbytes: int) -> float:
        return self.load_byte * nbytes


class VirtualTokenCounter:
    """The counters of all tenants. Pure: no clock, no I/O."""

    def __init__(self, credit: float = 0.0) -> None:
        """
        Args:
            credit: most that a tenant which used less than its share keeps for its return.
        """
        self._credit = credit
        self.floor = 0.0
        self.total = 0.0  # price of all work so far, without weights
        self._counters: dict[str, float] = {}
        self._active: set[str] = set()
        self._admissions = 0
        self._admitted: dict[str, int] = {}  # tenant -> number of its last admission
        self._latest = ""  # the tenant admitted last
        self._sweep_at = _SWEEP_FROM

    def counter(self, tenant: str) -> float:
        """One that isn't remembered would be lifted to this, or above."""
        return self._counters.get(tenant, self.floor - self._credit)

    def order(self, tenant: str) -> tuple[float, int]:
        """What tenants are compared by, lowest first: of equals, who was admitted longest ago."""
        return self.counter(tenant), self._admitted.get(tenant, 0)

    def active(self, tenant: str) -> bool:
        return tenant in self._active

    def behind(self, tenant: str) -> bool:
        """Less was done for it lately than for everybody who waited."""
        return self.counter(tenant) < self.floor

    def lowest(self) -> float:
        """Of the active counters; the floor where there are none."""
        return min((self._counters[t] for t in self._active), default=self.floor)

    def join(self, tenant: str) -> None:
        """The tenant has a request that could start; lifts it unless it had one already."""
        if tenant in self._active:
            return
        latest = self.counter(self._latest) if self._latest and not self._active else self.lowest()
        self.floor = max(self.floor, latest)
        self._counters[tenant] = max(self.counter(tenant), self.floor - self._credit)
        self._active.add(tenant)

    def leave(self, tenant: str) -> None:
        """None of the tenant's requests could start any more."""
        self._active.discard(tenant)

    def admit(self, tenant: str) -> None:
        """A request of an active tenant starts; charge it after this."""
        self.floor = max(self.floor, self.lowest())
        self._admissions += 1
        self._admitted[tenant] = self._admissions
        self._latest = tenant
        self._forget()

    def charge(self, tenant: str, price: float, weight: float) -> None:
        """Work is about to be done for the tenant, active or not."""
        self._counters[tenant] = self.counter(tenant) + price / weight
        self.total += price

    def leads(self, tenants: Iterable[str], most: int) -> dict[str, float]:
        """How far above a newcomer's the counters are: of `tenants` first, then of those furthest
        ahead."""
        named = dict.fromkeys(tenants)
        others = sorted(self._counters.keys() - named.keys(), key=self.counter, reverse=True)
        shown = [*named, *others][:most]
        newcomer = self.floor - self._credit
        return {t: max(0.0, self.counter(t) - newcomer) for t in shown}

    def _forget(self) -> None:
        """Drops counters that mean nothing any more, whenever their number has doubled."""
        if len(self._counters) < self._sweep_at:
            return
        least = self.floor - self._credit
        kept = {t: c for t, c in self._counters.items() if c > least or t in self._active}
        self._counters = kept
        self._admitted = {t: n for t, n in self._admitted.items() if t in kept}
        self._sweep_at = max(_SWEEP_FROM, 2 * len(kept))
