"""Which worker group serves a request: a pure function of the routing table and the loads."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Literal

from .control.table import GroupEntry, RoutingTable
from .rendezvous import rank

Reason = Literal["base", "placed", "cold", "spill"]
Floods = Mapping[str, tuple[float, float]]  # tenant -> (open requests, expected wait in seconds)


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """What a gateway knows of a group's load.

    Args:
        requests: open ones, of all gateways.
        wait_s: expected until a new request's prompt is begun, after all that wait.
        turn_s: the same by turns, of a tenant that isn't among `floods`.
        token_s: seconds that a prompt token takes.
        resident: keys of the adapters in the group's pool.
        floods: tenants whose requests wait behind those of others: how many each has open, and
            its own wait.
    """

    requests: float
    wait_s: float = 0.0
    turn_s: float = 0.0
    token_s: float = 0.0
    resident: Container[str] = frozenset()
    floods: Floods = field(default_factory=dict)

    calm: float = field(init=False)  # requests without those of floods

    def __post_init__(self) -> None:
        calm = self.requests
        for count, _ in self.floods.values():
            calm -= count
        # Floods are told later than the number of requests.
        object.__setattr__(self, "calm", calm if calm > 0.0 else 0.0)

    def requests_before(self, tenant: str) -> float:
        """Those that its turn leaves before or beside a new one of this tenant."""
        return self.requests if tenant in self.floods else self.calm

    def wait_of(self, tenant: str) -> float:
        """That of a new request of this tenant, by turns."""
        own = self.floods.get(tenant)
        return self.turn_s if own is None else own[1]

    def after(self, tenant: str, prompt_tokens: int) -> GroupLoad:
        """The load with one more request. A flood delays only itself by its turn."""
        added_s = prompt_tokens * self.token_s
        turn_s, floods = self.turn_s, self.floods
        if tenant in floods:
            n, own_s = floods[tenant]
            floods = {**floods, tenant: (n + 1, own_s + added_s)}
        else:
            turn_s += added_s
        return GroupLoad(
            self.requests + 1, self.wait_s + added_s, turn_s, self.token_s, self.resident, floods
        )


@dataclass(frozen=True, slots=True)
class Ask:
    """What a choice depends on, of a request.

    Args:
        adapter_key: `AdapterRef.key`, None for the base model.
        prompt_hash: 64 bits of the prompt's first tokens, the same for the same prompt.
        prompt_tokens: to be computed.
        cached: group -> how many of them its prefix cache should have (`PrefixRecord.cached`).
        tenant: whose it is.
    """

    adapter_key: str | None
    prompt_hash: int
    prompt_tokens: int = 0
    cached: Mapping[str, int] = field(default_factory=dict)
    tenant: str = ""


@dataclass(frozen=True)
class RoutingPolicy:
    """How far a group may run above the mean before its adapters' requests go elsewhere.

    A group is overloaded when its load exceeds `bound_factor` times the mean load of all
    candidates plus `bound_slack` requests (consistent hashing with bounded loads, Mirrokni et al.
    2018). The factor is far above 1 because a spilled request makes another group load the adapter.

    Args:
        near_bytes_s, far_bytes_s: speed of a load from the node's memory or disk, and from the
            object store; the defaults are `simulate.Hardware`'s disk and store.
        spill_gain_s: how much sooner than at home a request must be served by a group that has to
            load its adapter, for the bytes that it costs.
    """

    bound_factor: float = 1.5
    bound_slack: float = 4.0
    near_bytes_s: float = 2e9
    far_bytes_s: float = 415e6
    spill_gain_s: float = 0.75


@dataclass(frozen=True)
class Decision:
    """A chosen group, and why: the base model's, one that the adapter is placed on, the home of a
    cold adapter, or a group outside these because they are overloaded."""

    entry: GroupEntry
    reason: Reason


DEFAULT_POLICY = RoutingPolicy()
_IDLE = GroupLoad(0.0)


def choose(
    table: RoutingTable,
    ask: Ask,
    loads: Mapping[str, GroupLoad],
    exclude: AbstractSet[str] = frozenset(),
    policy: RoutingPolicy = DEFAULT_POLICY,
) -> GroupEntry | None:
    """The group that should serve a request; see `decide` for the rules."""
    decision = decide(table, ask, loads, exclude, policy)
    return decision.entry if decision else None


def decide(
    table: RoutingTable,
    ask: Ask,
    loads: Mapping[str, GroupLoad],
    exclude: AbstractSet[str] = frozenset(),
    policy: RoutingPolicy = DEFAULT_POLICY,
) -> Decision | None:
    """Chooses a group for one request by the delay that it is to expect there: the wait, the
    prompt's uncached tokens, and the load of its adapter.

    The base model goes where that is least. An adapter goes to the better of two of its placed
    groups (drawn by the prompt, so equal prompts meet the same prefix caches) and of those that
    have the prompt's prefix. A cold one goes to its home, the same from every gateway, so it is
    loaded once: the first in its hash order of the groups with the pack on their node, else of
    all. An overloaded group is passed over: for another placed one, or along the hash order for
    any that isn't. A placed adapter leaves its groups only for one that serves it sooner, its
    load included: a queue that is shorter than a load is worth waiting in.

    Loads are those of all requests, so that work moves to where there is room, for everybody's
    sake. Where most groups are flooded nothing is won by that: then a tenant goes by what stands
    before its own turn.

    A standby group (see `GroupEntry`) is chosen for what is placed on it, and where all others
    are excluded.

    Args:
        table: what the controller published last.
        loads: fresher than the table's; may be partial.
        exclude: groups that must not be chosen, such as those that just failed.

    Returns:
        The decision, or None when no group may be chosen.
    """
    names = [name for name in table.regular if name not in exclude]
    if not names:
        # A standby group is better than none.
        names = [name for name in table.serving if name not in exclude]
        if not names:
            return None
    if ask.adapter_key is None:
        view = _View(table, ask, loads, policy, names)
        return Decision(table.serving[view.quickest(names)], "base")
    allowed = set(names)
    listed = table.placement.get(ask.adapter_key, ())
    placed = [name for name in listed if name in table.serving and name not in exclude]
    standby = [name for name in placed if name not in allowed]
    view = _View(table, ask, loads, policy, [*names, *standby])
    if not placed:
        target, reason = _cold(view, table, ask.adapter_key, names, allowed)
    else:
        target, reason = _placed(view, table, ask.adapter_key, placed, names)
    return Decision(table.serving[target], reason)


def _cold(
    view: _View, table: RoutingTable, key: str, names: list[str], allowed: set[str]
) -> tuple[str, Reason]:
    near = [name for name in table.near.get(key, ()) if name in allowed]
    if near and not view.overloaded(near[0]):
        return near[0], "cold"
    order = [*near, *rank(key, names)]
    # At least one group is at or below the mean, so the walk ends inside the list as long as the
    # factor is at least 1.
    target = next((n for n in order if not view.overloaded(n)), order[0])
    return target, "cold" if target == order[0] else "spill"


def _placed(
    view: _View, table: RoutingTable, key: str, placed: list[str], names: list[str]
) -> tuple[str, Reason]:
    drawn = placed if len(placed) <= 2 else rank(view.ask.prompt_hash, placed)[:2]
    cached = [n for n in placed if n in view.ask.cached and n not in drawn]
    first = view.quickest([*drawn, *cached])
    if not view.overloaded(first):
        return first, "placed"
    others = [n for n in placed if not view.overloaded(n)]
    if others:
        return view.quickest(others), "placed"
    home = view.quickest(placed)
    home_s = view.delay_s(home)
    # The first that will do, not the best of all: requests that spill at the same time should
    # meet at one copy.
    for name, load_s in view.by_load_time(key, [n for n in names if n not in placed]):
        if view.delay_s(name) + load_s < home_s:
            return name, "spill"
    return home, "placed"


class _View:
    """One request's delays at the candidates, and the requests that count there."""

    def __init__(
        self,
        table: RoutingTable,
        ask: Ask,
        loads: Mapping[str, GroupLoad],
        policy: RoutingPolicy,
        names: list[str],
    ) -> None:
        self.ask, self.policy = ask, policy
        self._table = table
        self._loads = {name: loads.get(name) or _known(table.serving[name]) for name in names}
        found = self._loads.items()
        self._by_turns = 2 * len([None for _, load in found if load.floods]) > len(names)
        if self._by_turns:
            self._requests = {name: load.requests_before(ask.tenant) for name, load in found}
        else:
            self._requests = {name: load.requests for name, load in found}
        mean = sum(self._requests.values()) / len(names)
        self._bound = policy.bound_factor * mean + policy.bound_slack

    def overloaded(self, name: str) -> bool:
        return self._requests[name] > self._bound

    def delay_s(self, name: str) -> float:
        load = self._loads[name]
        tokens = self.ask.prompt_tokens - self.ask.cached.get(name, 0)
        wait_s = load.wait_of(self.ask.tenant) if self._by_turns else load.wait_s
        return wait_s + load.token_s * tokens

    def by_load_time(self, key: str, names: list[str]) -> Iterator[tuple[str, float]]:
        """Groups that aren't overloaded, and the seconds that the adapter takes to get there and
        its bytes are worth: where it is (none), then where its pack is, then others; each in the
        adapter's hash order."""
        open_to = [n for n in names if self._requests[n] <= self._bound]
        resident = [n for n in open_to if key in self._loads[n].resident]
        yield from ((n, 0.0) for n in rank(key, resident))
        nbytes, price_s = self._table.sizes.get(key, 0), self.policy.spill_gain_s
        near = [n for n in self._table.near.get(key, ()) if n in open_to and n not in resident]
        yield from ((n, price_s + nbytes / self.policy.near_bytes_s) for n in near)
        seen = {*resident, *near}
        far_s = price_s + nbytes / self.policy.far_bytes_s
        yield from ((n, far_s) for n in rank(key, [n for n in open_to if n not in seen]))

    def quickest(self, names: Iterable[str]) -> str:
        """The least delay, then the least load. Among equals the prompt decides, so that idle
        groups share traffic and keep prefixes."""
        scores = {n: (self.delay_s(n), self._requests[n]) for n in names}
        best = min(scores.values())
        equal = [n for n, score in scores.items() if score == best]
        return equal[0] if len(equal) == 1 else rank(self.ask.prompt_hash, equal)[0]


def _known(entry: GroupEntry) -> GroupLoad:
    requests = entry.queued + entry.running
    return GroupLoad(requests) if requests else _IDLE
