"""How many of the running sequences may be one tenant's.

A place is free again only when a sequence ends. If a flood had all of them, a tenant below its
share would wait for that although it is next. So a tenant starts another sequence only while it has
less than `PER_FREE` times as many as places are free: a flood leaves a fifth of them, from which
everyone else starts at once, and takes what others don't use. While nobody else has come for a
while, all places are the one tenant's.

Who is below its share may have any free place, for that is whom they are kept free for: a tenant
whose adapter only this group holds may need as many places here as the flood has, and use less
than its share of the work all the same.
"""

from __future__ import annotations

from collections import Counter, deque

PER_FREE = 4
_WHILE = 8  # so many times all places were given out


class Places:
    """Who has how many of `total` places. Pure."""

    def __init__(self, total: int):
        self.total = total
        self._taken: Counter[str] = Counter()
        self._recent: deque[str] = deque()  # who took the last ones
        self._recently: Counter[str] = Counter()

    @property
    def free(self) -> int:
        return self.total - self._taken.total()

    def open_to(self, tenant: str, behind: bool = False) -> bool:
        """Whether the tenant may take another one now.

        Args:
            behind: it is below its share (`VirtualTokenCounter.behind`).
        """
        free = self.free
        alone = self._recently.keys() <= {tenant}
        return free > 0 and (behind or alone or self._taken[tenant] < PER_FREE * free)

    def take(self, tenant: str) -> None:
        self._taken[tenant] += 1
        self._recent.append(tenant)
        self._recently[tenant] += 1
        if len(self._recent) > _WHILE * self.total:
            self._drop(self._recently, self._recent.popleft())

    def give(self, tenant: str) -> None:
        self._drop(self._taken, tenant)

    @staticmethod
    def _drop(counts: Counter[str], tenant: str) -> None:
        counts[tenant] -= 1
        if not counts[tenant]:
            del counts[tenant]
