"""Which adapters each group should hold: a pure, deterministic planner.

It starts from what the groups hold and what the last plan wanted, and changes only what pays:
a plan under constant demand comes to rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

from ...workers import GroupReport
from ..rendezvous import rank
from .board import Board
from .fill import Moves, even_out, place_missing
from .host_copies import plan_host
from .plan import PlacementConfig, Plan


def plan(
    reports: Iterable[GroupReport],
    demand: Mapping[str, float],
    previous: Plan,
    config: PlacementConfig,
) -> Plan:
    """The next plan.

    Args:
        reports: the newest one of each live group, in any order.
        demand: adapter key -> weighted tokens/s; base-model work under "tenant/base".
        previous: the last plan; an empty one after a start.
        config: how eagerly to act.

    Returns:
        A plan in which no group's desired adapters exceed its pool; a copy that was desired and
        is held goes only if another desired copy of it is held, or to make room for what is asked
        for more while no other group has room for it; draining groups keep what they hold and
        get nothing new. Leaving groups are like draining ones, but requests still go to them for
        what no other group holds.
    """
    groups = sorted(reports, key=lambda g: g.group)
    serving = [g for g in groups if g.stays]
    leaving = _leaving(groups)
    sizes = _sizes(groups, demand, previous.sizes)
    rates = {
        k: rate for k, rate in sorted(demand.items()) if rate >= config.min_rate and k in sizes
    }
    # The last copy of what nobody asks for is worth a place that nobody else wants.
    rates = dict.fromkeys(sorted(leaving - rates.keys()), config.min_rate) | rates
    asked_for = rates  # all of it deserves copies in memory
    spare = _spare(rates, sizes, serving, config)
    if spare:
        rates = _worth_planning(rates, sizes, serving, previous, config)
    overdue = {copy for copy, age in previous.waiting.items() if age >= config.patience_ticks}
    board = Board(serving, rates, sizes, overdue, spare)
    all_rates = {**rates, **demand}
    total = sum(rate for _, rate in sorted(all_rates.items()))  # sorted: sums round by order
    busy = previous.busy + (_busy(serving) - previous.busy) / config.busy_ticks
    replicas = {
        key: _replicas(rate, busy * rate / total, board, key, previous.replicas.get(key, 1), config)
        for key, rate in rates.items()
    }
    relocations = _keep(board, replicas, previous, overdue | _evicted(board, previous, spare))
    largest = max((sizes[key] for key in rates), default=0)
    moves = Moves(
        board,
        min(
            previous.credit_bytes + config.move_bytes_per_tick,
            max(config.move_bytes_per_tick, largest),
        ),
    )
    first = leaving | _lost(previous, groups) if spare else rates
    place_missing(board, replicas, relocations, moves, leaving & demand.keys(), first, config)
    even_out(board, relocations, moves, config)

    desired = {name: tuple(board.ranked(name)) for name in board.names}
    for group in groups:
        if not group.stays:
            held = sorted(group.engine.gpu, key=lambda k: (-demand.get(k, 0.0), k))
            desired[group.group] = tuple(held)
    return Plan(
        desired=desired,
        host=plan_host(serving, asked_for, sizes, desired, previous.host, config),
        placement=_placement(board, serving, [g for g in groups if g.leaving and not g.draining]),
        near=_near(serving),
        moves=tuple(moves.made),
        replicas=replicas,
        relocations=relocations,
        waiting={
            (key, name): previous.waiting.get((key, name), 0) + 1
            for name in board.names
            for key in desired[name]
            if not board.holds(name, key)
        },
        sizes=dict(sorted(sizes.items())),
        credit_bytes=moves.credit_bytes,
        busy=busy,
    )


def _sizes(
    groups: list[GroupReport], demand: Mapping[str, float], known: Mapping[str, int]
) -> dict[str, int]:
    """Bytes of adapters in a pool: as reported now or before, else estimated from their packs."""
    gpu: dict[str, int] = {}
    disk: dict[str, int] = {}
    for group in groups:
        engine = group.engine
        for sizes, reported in ((gpu, engine.gpu), (disk, engine.disk), (disk, engine.host)):
            for key, nbytes in reported.items():
                sizes[key] = max(nbytes, sizes.get(key, 0))
    # A pool may keep another precision than the packs, and rounds up to its blocks.
    growth = max((gpu[k] / disk[k] for k in gpu if disk.get(k)), default=1.0)
    estimated = {key: int(nbytes * growth) for key, nbytes in disk.items() if key not in gpu}
    return {
        k: n
        for k, n in (estimated | dict(known) | gpu).items()
        if k in demand or k in gpu or k in disk
    }


def _spare(
    rates: Mapping[str, float],
    sizes: Mapping[str, int],
    serving: list[GroupReport],
    config: PlacementConfig,
) -> float:
    """Share of the pools to leave free: none as long as all adapters fit."""
    capacity = sum(g.engine.pool_bytes_total for g in serving)
    return config.spare if sum(sizes[key] for key in rates) > capacity else 0.0


def _worth_planning(
    rates: Mapping[str, float],
    sizes: Mapping[str, int],
    serving: list[GroupReport],
    previous: Plan,
    config: PlacementConfig,
) -> Mapping[str, float]:
    """The most asked for of `rates`, as far as pools reach without their `spare`: a miss costs an
    adapter's bytes, so what its place saves per byte is how often it is asked for.

    One that was planned for stays so until its place is worth `displace_margin` times as much to
    another: demand that rests on a few requests would change the plan with each of them.
    """
    capacity = sum(g.engine.pool_bytes_total for g in serving)
    left = (1 - config.spare) * capacity
    kept: dict[str, float] = {}

    def value(key: str) -> float:
        known = config.displace_margin if key in previous.replicas else 1.0
        return known * rates[key]

    for key in sorted(rates, key=lambda k: (-value(k), k)):
        left -= sizes[key]
        if left < 0:
            break
        kept[key] = rates[key]
    return dict(sorted(kept.items()))


def _busy(serving: list[GroupReport]) -> float:
    """How many groups the running and waiting requests would fill."""
    engines = [g.engine for g in serving]
    return sum((e.running + e.queued) / e.max_running for e in engines if e.max_running)


def _replicas(
    rate: float,
    filled: float,
    board: Board,
    key: str,
    count: int,
    config: PlacementConfig,
) -> int:
    """Copies that an adapter should have, so that each fills a group by `replica_fill` at most.

    `filled`: groups that its requests would fill. `count` is what the last plan wanted. The band
    around each step keeps the number from changing back and forth; it is kept by adapter, so a
    group that joins or leaves doesn't wipe it out.
    """
    if rate < config.replica_min_rate * (1.0 if count == 1 else 0.5):
        return 1
    shares = filled / config.replica_fill
    while shares > count + config.replica_band:
        count += 1
    while count > 1 and shares < count - 1 - config.replica_band:
        count -= 1
    if count > 1:
        count = min(count, sum(board.able(key, group) for group in board.names))
    return max(1, count)


def _keep(
    board: Board,
    replicas: Mapping[str, int],
    previous: Plan,
    given_up: AbstractSet[tuple[str, str]],
) -> dict[str, tuple[str, str]]:
    """Puts on the board what is already there or on its way, and trims surplus copies.

    Args:
        given_up: (adapter key, group) pairs that aren't on their way any more.

    Returns the relocations that go on.
    """
    wanted: dict[str, set[str]] = {}
    for group in board.names:
        for key in previous.desired.get(group, ()):
            if board.holds(group, key) or (key, group) not in given_up:
                wanted.setdefault(key, set()).add(group)
    relocations: dict[str, tuple[str, str]] = {}
    counts: dict[str, int] = {}
    steps: list[list[tuple[str, str]]] = [[], [], [], []]
    for key, count in replicas.items():
        planned, held = wanted.get(key, set()), board.holders(key)
        source, target = previous.relocations.get(key, ("", ""))
        if source in held and target in planned:
            if target in held:
                held.discard(source)
                planned.discard(source)
            else:
                relocations[key] = (source, target)
                count += 1
        counts[key] = count
        for nth, group in enumerate(_best_first(board, key, held, planned)):
            # What was loaded for a request alone must not push out what is on its way.
            step = (0 if group in held else 1) if group in planned else 2
            steps[step if nth < count else 3].append((key, group))
    for step in steps:
        for key, group in sorted(step, key=lambda c: (-board.demand[c[0]], c)):
            if board.count(key) < counts[key] and board.fits(key, group):
                board.add(key, group)
    return {
        key: pair for key, pair in relocations.items() if set(pair) <= board.copies.get(key, set())
    }


def _evicted(board: Board, previous: Plan, spare: float) -> frozenset[tuple[str, str]]:
    """Copies that their groups had and gave up, where pools don't hold all: requests for others
    would push them out again as often as they were brought back."""
    if not spare:
        return frozenset()
    return frozenset(
        (key, group)
        for group in board.names
        for key in previous.desired.get(group, ())
        if not board.holds(group, key) and (key, group) not in previous.waiting
    )


def _best_first(board: Board, key: str, held: set[str], planned: set[str]) -> list[str]:
    groups = held | planned
    if len(groups) < 2:
        return list(groups)
    return sorted(rank(key, groups), key=lambda g: (g not in held, g not in planned))


def _leaving(groups: list[GroupReport]) -> frozenset[str]:
    """Adapters that only groups on their way out hold."""
    staying = {key for g in groups if g.stays for key in g.engine.gpu}
    going = {key for g in groups if not g.stays for key in g.engine.gpu}
    return frozenset(going - staying)


def _lost(previous: Plan, groups: list[GroupReport]) -> frozenset[str]:
    """Adapters that the last plan wanted in groups that are gone."""
    here = {g.group for g in groups}
    return frozenset(
        key for group, keys in previous.desired.items() if group not in here for key in keys
    )


def _near(serving: list[GroupReport]) -> dict[str, tuple[str, ...]]:
    """Groups from whose node an adapter comes soonest: with its pack in memory, else on disk."""
    near: dict[str, list[str]] = {}
    disk: dict[str, list[str]] = {}
    for group in serving:
        for found, reported in ((near, group.engine.host), (disk, group.engine.disk)):
            for key in reported:
                found.setdefault(key, []).append(group.group)
    return {key: tuple(rank(key, names)) for key, names in (disk | near).items()}


def _placement(
    board: Board, serving: list[GroupReport], leaving: list[GroupReport]
) -> dict[str, tuple[str, ...]]:
    """Where requests go: copies that are held, by a leaving group if by no other; before the first
    is, the one on its way."""
    holders: dict[str, list[str]] = {}
    for group in serving:
        for key in group.engine.gpu:
            holders.setdefault(key, []).append(group.group)
    last: dict[str, list[str]] = {}
    for group in leaving:
        for key in group.engine.gpu.keys() - holders.keys():
            last.setdefault(key, []).append(group.group)
    holders |= last
    placement: dict[str, tuple[str, ...]] = {}
    for key in sorted(board.copies.keys() | holders.keys()):
        names = board.held_copies(key) or holders.get(key)
        if names:
            placement[key] = tuple(rank(key, names))
        elif board.copies[key]:
            placement[key] = (rank(key, board.copies[key])[0],)
    return placement
