"""Which worker group serves a request: a pure function of the routing table and the loads."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

from .control.table import GroupEntry, RoutingTable
from .rendezvous import rank

Reason = Literal["base", "placed", "cold", "spill"]


@dataclass(frozen=True)
class RoutingPolicy:
    """How far a group may run above the mean before its adapters' requests go elsewhere.

    A group is overloaded when its load exceeds `bound_factor` times the mean load of all
    candidates plus `bound_slack` requests (consistent hashing with bounded loads, Mirrokni et al.
    2018). The factor is far above 1 because a spilled request makes another group load the adapter.
    """

    bound_factor: float = 1.5
    bound_slack: float = 4.0


@dataclass(frozen=True)
class Decision:
    """A chosen group, and why: the base model's least loaded group, one that the adapter is
    placed on, the home of a cold adapter, or a group outside these because they are overloaded."""

    entry: GroupEntry
    reason: Reason


DEFAULT_POLICY = RoutingPolicy()


def choose(
    table: RoutingTable,
    adapter_key: str | None,
    prompt_hash: int,
    load: Mapping[str, float],
    exclude: AbstractSet[str] = frozenset(),
    policy: RoutingPolicy = DEFAULT_POLICY,
) -> GroupEntry | None:
    """The group that should serve a request; see `decide` for the rules."""
    decision = decide(table, adapter_key, prompt_hash, load, exclude, policy)
    return decision.entry if decision else None


def decide(
    table: RoutingTable,
    adapter_key: str | None,
    prompt_hash: int,
    load: Mapping[str, float],
    exclude: AbstractSet[str] = frozenset(),
    policy: RoutingPolicy = DEFAULT_POLICY,
) -> Decision | None:
    """Chooses a group for one request.

    The base model goes to the least loaded group. An adapter goes to the less loaded of two of
    its placed groups (the two are drawn by the prompt, so equal prompts meet the same prefix
    caches); a cold adapter goes to its rendezvous-hashed home, the same from every gateway, so it
    is loaded once. When that group is overloaded, the request spills: first to the adapter's other
    placed groups, then along the adapter's hash order.

    Args:
        table: what the controller published last.
        adapter_key: `AdapterRef.key`, None for the base model.
        prompt_hash: 64-bit hash of the prompt's first blocks, the same for the same prompt.
        load: group -> expected load in requests, fresher than the table's; may be partial.
        exclude: groups that must not be chosen, such as those that just failed.

    Returns:
        The decision, or None when no group may be chosen.
    """
    entries = {e.group: e for e in table.groups if not e.draining and e.group not in exclude}
    if not entries:
        return None
    loads = {
        name: load[name] if name in load else float(e.queued + e.running)
        for name, e in entries.items()
    }

    def least_loaded(names: list[str]) -> str:
        # Among equals the prompt decides, so that idle groups share traffic and keep prefixes.
        lowest = min(loads[name] for name in names)
        return rank(prompt_hash, [name for name in names if loads[name] == lowest])[0]

    if adapter_key is None:
        return Decision(entries[least_loaded(list(entries))], "base")

    bound = policy.bound_factor * sum(loads.values()) / len(loads) + policy.bound_slack
    placed = [name for name in table.placement.get(adapter_key, ()) if name in entries]
    if placed:
        first = least_loaded(rank(prompt_hash, placed)[:2])
        if loads[first] <= bound:
            return Decision(entries[first], "placed")
        other = least_loaded(placed)
        if loads[other] <= bound:
            return Decision(entries[other], "placed")
    order = rank(adapter_key, entries)
    # At least one group is at or below the mean, so the walk ends inside the list as long as the
    # factor is at least 1.
    target = next((name for name in order if loads[name] <= bound), least_loaded(order))
    if placed:
        return Decision(entries[target], "spill")
    return Decision(entries[target], "cold" if target == order[0] else "spill")
