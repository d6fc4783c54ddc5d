"""Which tokens a sequence holds, and how often it generated each: what penalties look at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


class TokenCounts:
    """Distinct tokens of one sequence. Kept on the host, so that no [N, vocab] state is needed.

    Args:
        prompt_ids: listed with a count of 0; empty where only generated tokens are penalised.
        output_ids: tokens generated so far.
    """

    def __init__(self, prompt_ids: Sequence[int], output_ids: Iterable[int] = ()):
        distinct = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        self._used = len(distinct)
        self._ids = np.zeros(2 * self._used + 64, dtype=np.int64)
        self._ids[: self._used] = distinct
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._place = {token: i for i, token in enumerate(distinct.tolist())}
        for token in output_ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Books a generated token."""
        place = self._place.get(token)
        if place is None:
            place = self._place[token] = self._used
            self._used += 1
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token
        self._counts[place] += 1

    @property
    def ids(self) -> np.ndarray:
        """int64 [M], each token once."""
        return self._ids[: self._used]

    @property
    def counts(self) -> np.ndarray:
        """float32 [M]: how often each was generated."""
        return self._counts[: self._used]
