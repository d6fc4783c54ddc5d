"""What a batch of rows asks of the sampler, packed into tensors on the device.

The host's arithmetic is numpy's over all rows, and everything travels in one copy. Rows are sorted
into groups by what they ask for themselves, never by what their neighbours do: that is what keeps
a row's draw the same in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..host_copies import to_device
from ..request import SamplingParams
from .grammar import GrammarState, fill_masks
from .penalties import TokenCounts

# In float32 a temperature of 1e-6 would overflow; such rows are greedy to rounding anyway.
_MIN_TEMPERATURE = 1e-4
# Factors that keep any finite logit finite.
_REPETITION = (1e-4, 1e4)


@dataclass
class Draw:
    """One row to sample: its parameters, and the position of the token being chosen.

    `banned` ids can't be chosen (end-of-sequence ids before min_tokens). `counts` and `grammar`
    are those of rows whose parameters say `host_state`.
    """

    params: SamplingParams
    position: int
    banned: tuple[int, ...] = ()
    counts: TokenCounts | None = None
    grammar: GrammarState | None = None

    @property
    def greedy(self) -> bool:
        return self.params.temperature == 0 or self.params.top_k == 1


@dataclass
class Filter:
    """top_k and top_p of some of the random rows.

    Attributes:
        rows: int64 [n], places among the random rows.
        top_k: int64 [n], at least 1; the vocabulary's size for "off".
        top_p: float64 [n].
    """

    rows: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor


@dataclass
class Sparse:
    """Values for single logits; `index` is int64 [M] into [N * V], each place once."""

    index: torch.Tensor
    values: torch.Tensor  # float32 [M]


@dataclass
class Penalties:
    """Repetition factor, and what is subtracted, of single logits; as `Sparse`."""

    index: torch.Tensor
    repetition: torch.Tensor  # float32 [M]
    subtracted: torch.Tensor  # float32 [M]


@dataclass
class SamplingBatch:
    """Parameters of N rows. What nobody asks for is None and costs nothing."""

    size: int
    mask_rows: torch.Tensor | None = None  # int64 [G]: rows with a grammar
    masks: torch.Tensor | None = None  # int32 [G, ceil(V / 32)]: bit i of a row: id i is allowed
    bias: Sparse | None = None
    penalties: Penalties | None = None
    banned: torch.Tensor | None = None  # int64 [M], as `Sparse.index`
    random_rows: torch.Tensor | None = None  # int64 [R]; None: all rows are greedy
    temperature: torch.Tensor | None = None  # float32 [R]
    uniform: torch.Tensor | None = None  # float64 [R] in [0, 1)
    min_p_rows: torch.Tensor | None = None  # int64 [n], places among the random rows
    log_min_p: torch.Tensor | None = None  # float32 [n]
    filter: Filter | None = None
    logprob_rows: torch.Tensor | None = None  # int64 [L]
    shown: tuple[int, ...] = ()  # logprob_rows, on the host
    top: tuple[int, ...] = ()  # alternatives for each of them

    @classmethod
    def build(cls, draws: Sequence[Draw], vocab: int, device: torch.device) -> SamplingBatch:
        """Packs the rows' parameters; the masks of grammars are computed here.

        Args:
            draws: one for each row of the logits, in their order.
            vocab: columns of the logits.
        """
        arrays: dict[str, np.ndarray] = {}
        _add_edits(arrays, draws, vocab)
        _add_random(arrays, draws, vocab)
        shown = tuple(i for i, d in enumerate(draws) if d.params.logprobs is not None)
        if shown:
            arrays["logprob_rows"] = _ints(shown)
        there = to_device(arrays, device)

        def part(name: str) -> dict[str, torch.Tensor]:
            prefix = f"{name}/"
            return {k.removeprefix(prefix): v for k, v in there.items() if k.startswith(prefix)}

        bias, penalties, filter_ = part("bias"), part("penalties"), part("filter")
        return cls(
            size=len(draws),
            bias=Sparse(**bias) if bias else None,
            penalties=Penalties(**penalties) if penalties else None,
            filter=Filter(**filter_) if filter_ else None,
            shown=shown,
            top=tuple(draws[i].params.logprobs or 0 for i in shown),
            **{name: tensor for name, tensor in there.items() if "/" not in name},
        )


def _add_edits(arrays: dict[str, np.ndarray], draws: Sequence[Draw], vocab: int) -> None:
    """Changes of single logits, and grammars' masks."""
    guided = [(i, d.grammar, d.banned) for i, d in enumerate(draws) if d.grammar is not None]
    if guided:
        arrays["mask_rows"] = _ints([i for i, _, _ in guided])
        arrays["masks"] = fill_masks([(g, banned) for _, g, banned in guided], vocab)
    bias = [
        (i * vocab + token, value)
        for i, d in enumerate(draws)
        for token, value in d.params.logit_bias
        if 0 <= token < vocab
    ]
    if bias:
        arrays["bias/index"] = _ints([place for place, _ in bias])
        arrays["bias/values"] = np.array([value for _, value in bias], dtype=np.float32)
    parts = [
        _penalties(i * vocab, d.params, d.counts, vocab)
        for i, d in enumerate(draws)
        if d.counts is not None
    ]
    if parts:
        for name, column in zip(
            ("index", "repetition", "subtracted"), zip(*parts, strict=True), strict=True
        ):
            arrays[f"penalties/{name}"] = np.concatenate(column)
    # A grammar's row has its banned ids taken out of the mask.
    banned = [
        i * vocab + token
        for i, d in enumerate(draws)
        if d.banned and d.grammar is None
        for token in d.banned
        if 0 <= token < vocab
    ]
    if banned:
        arrays["banned"] = _ints(banned)


def _penalties(
    first: int, params: SamplingParams, counts: TokenCounts, vocab: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids, times = counts.ids, counts.counts
    known = ids < vocab  # a model may have fewer rows than its tokenizer has names
    ids, times = ids[known], times[known]
    subtracted = params.frequency_penalty * times + params.presence_penalty * (times > 0)
    factor = np.clip(params.repetition_penalty, *_REPETITION)
    return first + ids, np.full(len(ids), factor, np.float32), subtracted.astype(np.float32)


def _add_random(arrays: dict[str, np.ndarray], draws: Sequence[Draw], vocab: int) -> None:
    """What rows that aren't greedy need."""
    rows = [i for i, d in enumerate(draws) if not d.greedy]
    if not rows:
        return
    params = [draws[i].params for i in rows]
    temperature = np.array([p.temperature for p in params], dtype=np.float32)
    arrays["random_rows"] = _ints(rows)
    arrays["temperature"] = np.maximum(temperature, np.float32(_MIN_TEMPERATURE))
    arrays["uniform"] = uniforms([p.seed for p in params], [draws[i].position for i in rows])
    floors = [(j, p.min_p) for j, p in enumerate(params) if p.min_p > 0]
    if floors:
        arrays["min_p_rows"] = _ints([j for j, _ in floors])
        arrays["log_min_p"] = np.log(np.array([v for _, v in floors])).astype(np.float32)
    cut = [j for j, p in enumerate(params) if 0 < p.top_k < vocab or p.top_p < 1]
    if cut:
        arrays["filter/rows"] = _ints(cut)
        arrays["filter/top_k"] = _ints([min(params[j].top_k or vocab, vocab) for j in cut])
        arrays["filter/top_p"] = np.array([params[j].top_p for j in cut])


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """Numbers in [0, 1), float64, each from its (seed, position): splitmix64's finaliser over both.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    mask = (1 << 64) - 1
    seed = np.array([s & mask for s in seeds], dtype=np.uint64)
    position = np.array([(p + 1) & mask for p in positions], dtype=np.uint64)
    # Arithmetic of uint64 arrays wraps around, which is what is wanted.
    z = seed * np.uint64(0x9E3779B97F4A7C15) + position * np.uint64(0xD1B54A32D192ED03)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def _ints(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)
