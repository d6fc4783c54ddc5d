"""The rules that others use, in the same simulator: hashing, Ray's multiplexing, two choices."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from ..rendezvous import pick
from .group import SimGroup
from .policy import Advice
from .trace import TracedRequest


class _Unadvised:
    """Groups load what requests ask for and evict the least recently used. Requests are served
    as they come."""

    tick_s: float | None = None
    fair = False

    def tick(self, now_s: float, groups: Iterable[SimGroup]) -> Mapping[str, Advice]:
        return {}


class HashLru(_Unadvised):
    """Every adapter has one home, by rendezvous hashing. The base model: the fewest requests."""

    name = "hash"

    def route(self, now_s: float, request: TracedRequest, groups: Mapping[str, SimGroup]) -> str:
        if request.adapter is None:
            return min(groups.values(), key=lambda g: (g.requests, g.name)).name
        home = pick(request.adapter, groups)
        assert home is not None
        return home


class TwoChoices(_Unadvised):
    """The one of two random groups that has fewer requests, whatever it holds."""

    name = "p2c"

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def route(self, now_s: float, request: TracedRequest, groups: Mapping[str, SimGroup]) -> str:
        return _fewer(self._rng, list(groups.values())).name


class RayMultiplex(_Unadvised):
    """Ray Serve's rule for multiplexed models (`MultiplexMixin.apply_multiplex_routing`, 2.60).

    One attempt at the replicas that hold the model, then those with the fewest models, then any;
    each attempt takes the one of two random candidates with the shorter queue, if that is below
    `max_ongoing_requests`. That limit is a group's `max_running` here (Ray's default of 5 would
    leave the GPUs idle), and the pauses between attempts are left out, both in its favour. Where
    all are at the limit, the request goes to the shorter of two queues instead of waiting in the
    router.
    """

    name = "ray"

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def route(self, now_s: float, request: TracedRequest, groups: Mapping[str, SimGroup]) -> str:
        everyone = list(groups.values())
        attempts = [everyone]
        if request.adapter is not None:
            fewest = min(len(g.pool.resident) for g in everyone)
            attempts = [
                [g for g in everyone if request.adapter in g.pool.resident],
                [g for g in everyone if len(g.pool.resident) == fewest],
                everyone,
            ]
        for candidates in attempts:
            if candidates:
                group = _fewer(self._rng, candidates)
                if group.requests < group.hardware.max_running:
                    return group.name
        return _fewer(self._rng, everyone).name


def _fewer(rng: random.Random, groups: Sequence[SimGroup]) -> SimGroup:
    """The one of two random groups with fewer requests."""
    two = rng.sample(groups, min(2, len(groups)))
    return min(two, key=lambda g: (g.requests, g.name))
