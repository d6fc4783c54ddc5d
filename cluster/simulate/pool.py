"""A simulated group's adapter pool: what is on the GPU, and what goes for what comes.

The rules are those of `workers/pool/residency.py`: what is in use stays; of the rest, adapters
that the controller doesn't want go first, the least recently used of them before others; a
prefetch never evicts what is wanted. Loads don't stop the engine.

Where a group serves tenants by turns, a request makes room when it is its turn, as in the engine;
else room is given in the order in which adapters were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from .clock import Clock
from .cores import Cores
from .hardware import Hardware
from .tiers import NodeTiers


@dataclass
class _Resident:
    nbytes: int
    users: int = 0
    last_used: int = 0
    fresh: bool = False  # a request waited for it and hasn't taken hold yet


class SimPool:
    """
    Args:
        sizes: adapter key -> bytes.
        changed: told the key of each adapter that has come, and by turns, of each for which room
            may be made now.
        cores: of its group.
        by_turns: `acquire` makes room.
    """

    def __init__(
        self,
        clock: Clock,
        hardware: Hardware,
        sizes: Mapping[str, int],
        tiers: NodeTiers,
        changed: Callable[[str], None],
        cores: Cores,
        by_turns: bool = False,
    ) -> None:
        self._cores = cores
        self._clock, self._hardware, self._sizes, self._tiers = clock, hardware, sizes, tiers
        self._changed, self._by_turns = changed, by_turns
        self.resident: dict[str, int] = {}  # key -> bytes, as a group's report has it
        self._state: dict[str, _Resident] = {}
        self._fetching: dict[str, bool] = {}  # to host memory -> whether a request waits for it
        self._copying: dict[str, bool] = {}  # to the GPU -> whether a request waits for it
        self._desired: tuple[str, ...] = ()
        self._desired_set: frozenset[str] = frozenset()
        self._roomless: dict[str, None] = {}  # in host memory, asked for, in the order they came
        self._uses = 0
        self._used_bytes = 0
        self._copy_free_at = 0.0
        self._alive = True
        self.bytes_loaded = 0
        self.loads: dict[str, int] = {}
        self.evictions = 0

    @property
    def blocked(self) -> bool:
        """A request's adapter waits for room."""
        return bool(self._roomless)

    @property
    def coming(self) -> list[str]:
        return [*self._fetching, *self._roomless, *self._copying]

    def lacks_room(self, key: str) -> bool:
        """Whether an adapter that isn't here waits for nothing but room."""
        return key in self._roomless

    def loaded_for_request(self, key: str) -> int:
        """Bytes of an adapter that came for a request which hasn't taken hold yet; else 0."""
        resident = self._state.get(key)
        return resident.nbytes if resident is not None and resident.fresh else 0

    def acquire(self, key: str) -> bool:
        """Takes hold of the adapter for one request; False when it isn't here: it comes then."""
        resident = self._state.get(key)
        if resident is None:
            self._ask(key)
            if self._by_turns and key in self._roomless:
                self._copy_if_room(key, evict_desired=True)
            return False
        self._uses += 1
        resident.users += 1
        resident.last_used = self._uses
        resident.fresh = False
        return True

    def want(self, key: str) -> None:
        """A request for the adapter was queued: it comes as far as there is room."""
        if key not in self._state:
            self._ask(key)

    def release(self, key: str) -> None:
        self._state[key].users -= 1
        self._retry()

    def advise(self, desired: Iterable[str]) -> None:
        """What the controller wants here; it comes when there is room."""
        self._set_desired(desired)
        self._retry()

    def _set_desired(self, desired: Iterable[str]) -> None:
        self._desired = tuple(desired)
        self._desired_set = frozenset(self._desired)

    def shut(self) -> None:
        """The group died: what was on its way goes nowhere."""
        self._alive = False

    def _ask(self, key: str) -> None:
        if key in self._roomless:
            return
        for coming in (self._fetching, self._copying):
            if key in coming:
                coming[key] = True
                return
        self._start(key, asked=True)

    def _start(self, key: str, asked: bool) -> None:
        self._fetching[key] = asked
        tier = self._tiers.fetch(key, lambda: self._fetched(key))
        self.loads[tier] = self.loads.get(tier, 0) + 1

    def _fetched(self, key: str) -> None:
        if not self._alive:
            return
        asked = self._fetching.pop(key)
        if asked:
            self._roomless[key] = None
            self._retry()
            if self._by_turns:
                self._changed(key)
        elif key in self._desired_set and self._make_room(key, evict_desired=False):
            self._copy(key, asked=False)

    def _copy_if_room(self, key: str, evict_desired: bool) -> bool:
        """For a request."""
        if not self._make_room(key, evict_desired):
            return False
        del self._roomless[key]
        self._copy(key, asked=True)
        return True

    def _retry(self) -> None:
        for key in list(self._roomless):
            if not self._copy_if_room(key, evict_desired=not self._by_turns):
                return
        for key in self._desired:
            if key in self._state or key in self._fetching or key in self._copying:
                continue
            if self._could_fit(key, evict_desired=False):
                self._start(key, asked=False)

    def _victims(self, evict_desired: bool) -> list[str]:
        """First to go first; last of all what a request waited for and will take hold of."""
        victims = sorted(
            (r.fresh, key in self._desired_set, r.last_used, key)
            for key, r in self._state.items()
            if r.users == 0 and (evict_desired or not (r.fresh or key in self._desired_set))
        )
        return [key for *_, key in victims]

    def _could_fit(self, key: str, evict_desired: bool) -> bool:
        need = self._used_bytes + self._sizes[key] - self._hardware.pool_bytes
        if need <= 0:
            return True
        return need <= sum(self._state[k].nbytes for k in self._victims(evict_desired))

    def _make_room(self, key: str, evict_desired: bool) -> bool:
        if not self._could_fit(key, evict_desired):
            return False
        limit = self._hardware.pool_bytes - self._sizes[key]
        for victim in self._victims(evict_desired):
            if self._used_bytes <= limit:
                break
            self._used_bytes -= self._state.pop(victim).nbytes
            del self.resident[victim]
            self.evictions += 1
            self._forget_desired(victim)
        return True

    def _forget_desired(self, key: str) -> None:
        """It gave way to a request: it isn't brought back unless the controller says so again."""
        if key in self._desired_set:
            self._set_desired(k for k in self._desired if k != key)

    def _copy(self, key: str, asked: bool) -> None:
        nbytes = self._sizes[key]
        self._used_bytes += nbytes
        self._copying[key] = asked
        self.bytes_loaded += nbytes
        start = max(self._clock.now, self._copy_free_at)
        hw = self._hardware
        latency_s = hw.load_latency_s * self._cores.slowed
        self._copy_free_at = start + latency_s + nbytes / hw.gpu_bytes_s
        self._clock.at(self._copy_free_at, lambda: self._copied(key))

    def _copied(self, key: str) -> None:
        if not self._alive:
            return
        asked = self._copying.pop(key)
        self._uses += 1
        self._state[key] = _Resident(self._sizes[key], last_used=self._uses, fresh=asked)
        self.resident[key] = self._sizes[key]
        self._changed(key)
        self._retry()  # what came for nobody may give way
