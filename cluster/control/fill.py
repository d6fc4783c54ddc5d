"""The planner's changes: copies that are missing, room for them, and even load."""

from __future__ import annotations

from collections.abc import Container, Mapping
from collections.abc import Set as AbstractSet

from .board import Board
from .plan import Move, PlacementConfig


class Moves:
    """Copies added in this tick, within the budget."""

    def __init__(self, board: Board, credit_bytes: int) -> None:
        self._board = board
        self.credit_bytes = credit_bytes
        self.made: list[Move] = []

    def affordable(self, key: str, group: str) -> bool:
        return self._cost(key, group) <= self.credit_bytes

    def add(self, key: str, group: str) -> None:
        cost = self._cost(key, group)
        self._board.add(key, group)
        if not self._board.holds(group, key):
            self.credit_bytes -= cost
            self.made.append(Move(key, group, cost))

    def _cost(self, key: str, group: str) -> int:
        return 0 if self._board.holds(group, key) else self._board.size(key, group)


def place_missing(
    board: Board,
    replicas: Mapping[str, int],
    relocations: dict[str, tuple[str, str]],
    moves: Moves,
    leaving: AbstractSet[str],
    wanted_first: Container[str],
    config: PlacementConfig,
) -> None:
    """Adds the copies that are missing, the most worth first; before all others those of which
    a draining group takes the last one with it (`leaving`).

    Args:
        wanted_first: adapters that are brought before a request asks for them, though no group
            holds them by plan.
    """
    missing = [
        (key not in leaving or nth > 1, -board.demand[key] / nth, key)
        for key, count in replicas.items()
        for nth in range(board.count(key) + 1, count + 1)
        if nth > 1 or key in wanted_first
    ]
    fixed = {(key, group) for key, pair in relocations.items() for group in pair}
    making_room = bool(relocations)
    # Copies added below are worth more than those that come after them, so only these can give way.
    least = min(
        (board.worth(key) for key in board.copies if board.count(key)), default=float("inf")
    )
    for _, negative, key in sorted(missing):
        worth = -negative
        group = board.roomy(key)
        victims: list[str] = []
        if group is None:
            if worth <= config.displace_margin * least:
                continue
            group, victims = _displacement(board, key, worth, fixed, config)
            if group is None:
                continue
        if not moves.affordable(key, group):
            return  # the budget is saved for this one
        moving = [
            v
            for v in victims
            if board.count(v) == 1 and board.holds(group, v) and board.roomy(v) is not None
        ]
        if moving:
            # Make before break: they load elsewhere first, and this copy waits for the room. One
            # such round at a time, else the wait would start the next round at another group.
            for victim in moving if not making_room else ():
                target = board.roomy(victim)
                if target is not None and moves.affordable(victim, target):
                    moves.add(victim, target)
                    relocations[victim] = (group, target)
                    fixed |= {(victim, group), (victim, target)}
            making_room = True
            continue
        for victim in victims:
            board.remove(victim, group)
        moves.add(key, group)
        fixed.add((key, group))


def _displacement(
    board: Board,
    key: str,
    worth: float,
    fixed: set[tuple[str, str]],
    config: PlacementConfig,
) -> tuple[str | None, list[str]]:
    """The group where a copy displaces the least worth, and what it displaces there."""
    best: tuple[float, int] | None = None
    found: tuple[str | None, list[str]] = (None, [])
    for position, group in enumerate(board.order(key)):
        if not board.open_to(key, group):
            continue
        room, lost, victims = board.free(group), 0.0, []
        need = board.size(key, group)
        for victim in reversed(board.ranked(group)):
            if room >= need or lost * config.displace_margin >= worth:
                break
            if victim == key or (victim, group) in fixed or _is_only_holder(board, victim, group):
                continue
            victims.append(victim)
            lost += board.worth(victim)
            room += board.size(victim, group)
        if room < need or lost * config.displace_margin >= worth:
            continue
        if best is None or (lost, position) < best:
            best, found = (lost, position), (group, victims)
    return found


def _is_only_holder(board: Board, key: str, group: str) -> bool:
    """The adapter's other copies are all still on their way."""
    return board.count(key) > 1 and board.held_copies(key) == [group]


def even_out(
    board: Board,
    relocations: dict[str, tuple[str, str]],
    moves: Moves,
    config: PlacementConfig,
) -> None:
    """When all is at rest, moves one adapter from the most to the least loaded group.

    It moves at most half their difference, so the sum of squared loads falls with every move:
    under constant demand this ends.
    """
    at_rest = not moves.made and not relocations
    if not at_rest or len(board.names) < 2:
        return
    top = min(board.names, key=lambda g: (-board.load[g], g))
    low = min(board.names, key=lambda g: (board.load[g], g))
    gap = board.load[top] - board.load[low]
    mean = sum(board.load.values()) / len(board.names)
    if board.load[top] <= config.imbalance * mean or gap < config.replica_min_rate:
        return
    for key in board.ranked(top):
        share = board.worth(key)
        if share < gap / 10:
            return  # a load of bytes for next to nothing
        if (
            share <= gap / 2
            and board.holds(top, key)
            and board.open_to(key, low)
            and board.fits(key, low)
            and moves.affordable(key, low)
        ):
            moves.add(key, low)
            relocations[key] = (top, low)
            return
