"""The step message: all that a rank needs to know to run one model step.

Rank 0 makes it, every rank obeys it. Adapter loads and unloads travel in it, so all ranks change
their tables on the same step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class SequenceStep:
    """One sequence's share of a step: new tokens at positions start, start + 1, ...

    With `carried` >= 0 its one new token is still on the device, sampled by the step before, and
    `token_ids` holds a stand-in: the host hasn't read it yet.
    """

    token_ids: list[int]
    start: int
    blocks: list[int]  # KV blocks of the whole sequence so far, in order
    slot: int  # adapter slot, -1 = base model
    logits_from: int = -1  # logits for new tokens from this index on; -1: for none
    carried: int = -1  # index into the ids that the step before sampled; -1: token_ids holds it


@dataclass
class SlotChange:
    """What becomes of an adapter slot.

    "load": fill its pages from the pack at `path`, in the background. "show": from this step on,
    the tables name it; its load has ended on rank 0, and other ranks' devices wait for theirs.
    "unload": empty it; also one that was never shown.
    """

    what: Literal["load", "show", "unload"]
    slot: int
    path: str | None = None


@dataclass
class Step:
    """A model step. Sequences are ordered by slot; slot changes are applied first."""

    sequences: list[SequenceStep] = field(default_factory=list)
    changes: list[SlotChange] = field(default_factory=list)
    shared_ids: int = 0  # so many ids that rank 0 samples go to all ranks: the next step may carry
    stop: bool = False

    def to_wire(self) -> dict[str, Any]:
        return {
            "s": [
                [s.token_ids, s.start, s.blocks, s.slot, s.logits_from, s.carried]
                for s in self.sequences
            ],
            "c": [[c.what, c.slot, c.path] for c in self.changes],
            "ids": self.shared_ids,
            "stop": self.stop,
        }

    @classmethod
    def from_wire(cls, msg: dict[str, Any]) -> Step:
        return cls(
            sequences=[SequenceStep(*s) for s in msg["s"]],
            changes=[SlotChange(*c) for c in msg["c"]],
            shared_ids=msg["ids"],
            stop=msg["stop"],
        )
