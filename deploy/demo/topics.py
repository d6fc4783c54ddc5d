"""Picks the word that a passage is about, so that a question can be asked about it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_WORD = re.compile(r"[a-z]{4,}")
_TOO_COMMON = 0.15  # a word in more passages than this says nothing about any of them
_TOO_RARE = 4  # passages; a word below it would never be asked for


@dataclass(frozen=True)
class Topics:
    """Word statistics of one style.

    Attributes:
        passages_with: in how many passages each word occurs.
        passages: how many passages were counted.
    """

    passages_with: Counter[str]
    passages: int

    @classmethod
    def of(cls, passages: Iterable[str]) -> Topics:
        counts: Counter[str] = Counter()
        total = 0
        for passage in passages:
            counts.update(set(_WORD.findall(passage.lower())))
            total += 1
        return cls(counts, total)

    def pick(self, passage: str) -> str:
        """The word with the highest tf-idf; ties go to the earlier in the alphabet."""
        # Capitalised words inside a sentence are mostly names; only lower-case ones are counted.
        words = Counter(_WORD.findall(passage))
        scored = [
            (-count * math.log(self.passages / self.passages_with[word]), word)
            for word, count in words.items()
            if _TOO_RARE <= self.passages_with[word] <= _TOO_COMMON * self.passages
        ]
        return min(scored)[1] if scored else "this"
