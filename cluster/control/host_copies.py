"""Which nodes should keep which packs in memory: copies from which adapters are brought back
quickly, after their group died or when they are asked for again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...workers import GroupReport
from ..rendezvous import rank
from .plan import PlacementConfig


def plan_host(
    groups: Iterable[GroupReport],
    demand: Mapping[str, float],
    sizes: Mapping[str, int],
    desired: Mapping[str, Iterable[str]],
    previous: Mapping[str, tuple[str, ...]],
    config: PlacementConfig,
) -> dict[str, tuple[str, ...]]:
    """Adapter keys by group, the most asked for first.

    Every adapter in demand gets `host_copies` nodes, as far as `host_share` of their memory
    reaches: those that have it, then those whose groups should hold it on the GPU, then by hash.
    What nobody asks for stays in the rest of the memory until others need the room. New copies are
    bounded by `host_bytes_per_tick`; adapters without any copy on a node that stays come first.

    Args:
        groups: the serving ones, in any order. Those at one address share a node's memory, and
            the first of them by name is told for all.
        sizes: bytes of adapters.
        desired: what the plan wants in the groups' pools.
        previous: the last answer; copies of it that aren't there yet are on their way.
    """
    nodes: dict[str, GroupReport] = {}
    wanted: dict[str, list[str]] = {}  # on GPUs: key -> nodes
    for group in sorted(groups, key=lambda g: g.group):
        if group.engine.host_bytes_total:
            nodes.setdefault(group.host, group)
            for key in desired.get(group.group, ()):
                wanted.setdefault(key, []).append(group.host)
    holders: dict[str, list[str]] = {}
    for name, node in nodes.items():
        coming = [k for k in previous.get(node.group, ()) if k not in node.engine.host]
        for key in (*node.engine.host, *coming):
            holders.setdefault(key, []).append(name)
    free = {
        name: int(config.host_share * node.engine.host_bytes_total) for name, node in nodes.items()
    }
    kept: dict[str, list[str]] = {name: [] for name in nodes}
    short: list[tuple[str, int]] = []
    for key in sorted(demand, key=lambda k: (-demand[k], k)):
        copies = 0
        nbytes = sizes.get(key, 0)
        gpu = wanted.get(key, ())
        for name in sorted(holders.get(key, ()), key=lambda n: (n not in gpu, n)):
            if copies < config.host_copies and nbytes <= free[name]:
                free[name] -= nbytes
                kept[name].append(key)
                copies += 1
        if nbytes and copies < config.host_copies and demand[key] >= config.min_rate:
            short.append((key, copies))
    budget = config.host_bytes_per_tick
    for key, copies in sorted(short, key=lambda s: s[1]):  # stable: then the most asked for
        nbytes = sizes[key]
        if nbytes > budget and budget < config.host_bytes_per_tick:
            break
        order = [*wanted.get(key, ()), *rank(key, nodes)]
        for name in dict.fromkeys(order):
            if copies >= config.host_copies or budget <= 0:
                break
            if name not in holders.get(key, ()) and nbytes <= free[name]:
                free[name] -= nbytes
                budget -= nbytes
                kept[name].append(key)
                copies += 1
    return {nodes[name].group: tuple(keys) for name, keys in kept.items()}
