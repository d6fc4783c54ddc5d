"""A step message as arrays: one entry per new token, in batch order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import WorkerError
from .step import Step

TOKEN_FIELDS = ("token_ids", "positions", "token_slot", "carried")


@dataclass(frozen=True)
class StepInputs:
    """T new tokens of S sequences, as int32 arrays on the host."""

    token_ids: np.ndarray  # [T]
    positions: np.ndarray  # [T]
    token_slot: np.ndarray  # [T], -1 = base model; never decreases
    carried: np.ndarray  # [T], index into the last sampled ids, -1 = token_ids holds the token
    logit_rows: np.ndarray  # [N], tokens whose logits are asked for
    num_adapters: int  # how many the step has
    decode: bool  # every sequence has one new token

    def by_token(self) -> dict[str, np.ndarray]:
        """The arrays of T entries."""
        return {name: getattr(self, name) for name in TOKEN_FIELDS}

    @classmethod
    def of(cls, step: Step) -> StepInputs:
        """Raises WorkerError where the sequences aren't ordered by slot."""
        seqs = step.sequences
        slots = np.array([s.slot for s in seqs], np.int32)
        if (slots[1:] < slots[:-1]).any():
            raise WorkerError("sequences of a step must be ordered by adapter slot")
        starts = np.array([s.start for s in seqs], np.int32)
        carried = np.array([s.carried for s in seqs], np.int32)
        logits_from = np.array([s.logits_from for s in seqs])
        adapted = slots[slots >= 0]
        num_adapters = 1 + int(np.count_nonzero(np.diff(adapted))) if adapted.size else 0
        if all(len(s.token_ids) == 1 for s in seqs):
            ids = np.array([s.token_ids[0] for s in seqs], np.int32)
            rows = np.flatnonzero(logits_from >= 0).astype(np.int32)
            return cls(ids, starts, slots, carried, rows, num_adapters, True)
        counts = np.array([len(s.token_ids) for s in seqs], np.int32)
        first = np.cumsum(counts, dtype=np.int32) - counts
        nth = np.arange(counts.sum(), dtype=np.int32) - np.repeat(
            first, counts
        )  # of its sequence's tokens
        wanted = np.repeat(np.where(logits_from < 0, counts, logits_from), counts)
        by_token = np.full(nth.size, -1, np.int32)
        by_token[first] = carried
        return cls(
            token_ids=np.array([t for s in seqs for t in s.token_ids], np.int32),
            positions=np.repeat(starts, counts) + nth,
            token_slot=np.repeat(slots, counts),
            carried=by_token,
            logit_rows=np.flatnonzero(nth >= wanted).astype(np.int32),
            num_adapters=num_adapters,
            decode=False,
        )
