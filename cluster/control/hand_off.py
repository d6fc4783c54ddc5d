"""When a new group may have requests, and when a leaving one may go: adapters are there first."""

from __future__ import annotations

from collections.abc import Mapping

from ...workers import GroupReport
from .plan import Plan


def is_ready(group: GroupReport, plan: Plan) -> bool:
    """Whether the group holds all that the plan wants of it."""
    return all(key in group.engine.gpu for key in plan.desired.get(group.group, ()))


def is_handed_off(group: GroupReport, reports: Mapping[str, GroupReport], plan: Plan) -> bool:
    """Whether all that can be brought elsewhere is there, of what a leaving group holds.

    Every adapter in its pool should be in another one's, unless none has room for it; and what it
    alone has in its node's memory in that of the nodes that the plan chose.

    Args:
        reports: of all groups, by name.
        plan: made with the group leaving.
    """
    staying = [g for g in reports.values() if g.stays]
    held = {key for g in staying for key in g.engine.gpu}
    room = max((_room(g, plan) for g in staying), default=0)
    wanted = {key for g in staying for key in plan.desired.get(g.group, ())}
    for key, nbytes in group.engine.gpu.items():
        if key not in held and (key in wanted or nbytes <= room):
            return False
    nodes = {g.host for g in staying}
    if group.host in nodes:
        return True  # its memory stays
    coming = {k for g in staying for k in plan.host.get(g.group, ()) if k not in g.engine.host}
    kept = {key for g in staying for key in g.engine.host}
    return not (coming - kept) & group.engine.host.keys()


def _room(group: GroupReport, plan: Plan) -> int:
    """Bytes of its pool that nothing is planned for."""
    engine = group.engine
    planned = sum(plan.sizes.get(key, 0) for key in plan.desired.get(group.group, ()))
    return engine.pool_bytes_total - planned
