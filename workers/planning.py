"""From the scheduler's choice to a step message and what to do with its logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .sampling.sampling_batch import Draw
from .scheduler import Scheduled
from .sequence import Sequence
from .step import SequenceStep, SlotChange, Step


@dataclass(frozen=True)
class PromptRows:
    """Rows of the step's logits that predict prompt tokens, whose log-probabilities are asked."""

    seq: Sequence
    row: int  # first row; the others follow
    targets: list[int]


@dataclass
class Plan:
    """One step, planned: what runs, and which rows choose a token.

    All that it holds is fixed when the step is launched: the sequences themselves may change
    before its result is read.
    """

    step: Step
    work: list[Scheduled]
    drawing: list[Sequence] = field(default_factory=list)  # in order of the sampled ids
    draws: list[Draw] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # of the logits, one for each draw
    prompts: list[PromptRows] = field(default_factory=list)
    logit_rows: int = 0

    @property
    def host_state(self) -> bool:
        """Whether a draw changes what the host has to say of the next one."""
        return any(d.params.host_state for d in self.draws)

    @property
    def tokens(self) -> int:
        """That go through the model."""
        return sum(w.count for w in self.work)

    @property
    def prefills(self) -> bool:
        """Whether it has more than decoding sequences."""
        return self.tokens > len(self.work)

    def index_of_draws(self) -> dict[Sequence, int]:
        return {seq: i for i, seq in enumerate(self.drawing)}


def plan_step(
    work: list[Scheduled],
    changes: list[SlotChange],
    carried: Mapping[Sequence, int],
    eos_token_ids: tuple[int, ...],
) -> Plan:
    """
    Args:
        work: of the sequences; it comes back ordered by slot.
        carried: where the unread token of a sequence is among the step before's sampled ids.
    """
    work = sorted(work, key=lambda w: -1 if w.seq.slot is None else w.seq.slot)
    plan = Plan(Step(changes=changes), work)
    for w in work:
        seq, end = w.seq, w.start + w.count
        draws = end == seq.length
        if seq.prompt_logprobs is not None and w.start < len(seq.request.prompt_ids):
            logits_from = 0
            first = w.start + 1  # position that the first row predicts
            # A preempted prompt is computed again: what is known of it already stays.
            known = max(0, len(seq.prompt_logprobs) - first)
            targets = seq.request.prompt_ids[first + known : first + w.count]
            if targets:
                plan.prompts.append(PromptRows(seq, plan.logit_rows + known, list(targets)))
        else:
            logits_from = w.count - 1 if draws else -1
        if logits_from >= 0:
            plan.logit_rows += w.count - logits_from
        if draws:
            plan.drawing.append(seq)
            plan.draws.append(_draw(seq, eos_token_ids))
            plan.rows.append(plan.logit_rows - 1)
        assert seq.slot is not None
        source = carried[seq] if seq.unread else -1
        token_ids = seq.tokens[w.start : end] if source < 0 else [0]
        plan.step.sequences.append(
            SequenceStep(token_ids, w.start, list(seq.blocks), seq.slot, logits_from, source)
        )
    return plan


def _draw(seq: Sequence, eos_token_ids: tuple[int, ...]) -> Draw:
    draw = Draw(seq.request.sampling, seq.length, _banned(seq, eos_token_ids))
    if seq.host is not None:
        draw.counts, draw.grammar = seq.host.counts, seq.host.grammar
    return draw


def _banned(seq: Sequence, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
    params = seq.request.sampling
    if seq.length - len(seq.request.prompt_ids) >= params.min_tokens:
        return ()
    return (*eos_token_ids, *params.stop_token_ids)
