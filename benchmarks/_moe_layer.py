"""The layer calls behind one row of benchmarks/moe_lora.py, and the check that they are right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _moe_inputs import FILLED_SLOTS, Routing, Shape, make_routing, make_tables, make_weights
from _moe_inputs import with_slots as tables_with_slots
from _moe_timing import Captured
from loraplex.kernels import (
    ExpertLoraTables,
    LoraBatch,
    MoeWeights,
    align_reference,
    fused_moe,
    moe_lora_align_block_size,
    moe_reference,
)

# Few tokens choose few experts: their figures are means over this many routings.
DECODE_TOKENS, DECODE_ROUTINGS = 64, 8
# Between two reads of the same bytes, this many times the L2 is read.
COLD_L2S = 4
_CHECKED_TOKENS = 8
_ALIGN_CALLS = 32  # in one graph: a call is a few us


@dataclass(frozen=True)
class LayerInput:
    """Arguments of one layer call; without `tables`, the base model alone."""

    x: torch.Tensor
    weights: MoeWeights
    routing: Routing
    tables: ExpertLoraTables | None = None
    token_slot: torch.Tensor | None = None

    def call(self) -> partial[torch.Tensor]:
        w = self.weights
        args = (self.x, w.w13, w.w2, self.routing.weights, self.routing.ids)
        scales = {"w13_scale": w.w13_scale, "w2_scale": w.w2_scale}
        if self.tables is None or self.token_slot is None:
            return partial(fused_moe, *args, **scales)
        batch = LoraBatch.from_token_slot(  # once a step, not timed
            self.token_slot, ordered=True, num_adapters=int(self.token_slot.unique().numel())
        )
        return partial(fused_moe, *args, lora=self.tables, token_slot=batch, **scales)

    def reference(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 output of the tokens `rows`."""
        slot = None if self.token_slot is None else self.token_slot[rows]
        w, weights, ids = self.weights, self.routing.weights[rows], self.routing.ids[rows]
        return moe_reference(
            self.x[rows], w.w13, w.w2, weights, ids, self.tables, slot,
            w13_scale=w.w13_scale, w2_scale=w.w2_scale,
        )  # fmt: skip


class Layers:
    """Weights and adapters of one shape, made once and read by all of its rows."""

    def __init__(
        self, shape: Shape, rank: int, dtype: torch.dtype, device: torch.device, l2_bytes: int
    ):
        self.shape, self.rank = shape, rank
        self._dtype, self._device, self._l2_bytes = dtype, device, l2_bytes
        self._weights: list[MoeWeights] = []
        self._tables = make_tables(shape, rank, dtype, device)

    def routings(self, tokens: int, adapters: int) -> list[Routing]:
        """Of the layer calls in one graph, on the CPU."""
        calls = DECODE_ROUTINGS if tokens <= DECODE_TOKENS else 1
        calls = max(calls, self._calls_that_outgrow_l2(tokens))
        return [make_routing(self.shape, tokens, adapters, index) for index in range(calls)]

    def base_inputs(self, routings: Sequence[Routing]) -> list[LayerInput]:
        """Each with an x of its own, and with other weights than the calls just before it."""
        tokens = routings[0].ids.shape[0]
        copies = self._calls_that_outgrow_l2(tokens)
        while len(self._weights) < copies:
            self._weights.append(make_weights(self.shape, self._dtype, self._device))
        size = (tokens, self.shape.hidden)
        return [
            LayerInput(
                torch.randn(size, device=self._device).to(self._dtype),
                self._weights[index % copies],
                routing.to(self._device),
            )
            for index, routing in enumerate(routings)
        ]

    def lora_inputs(
        self, base: Sequence[LayerInput], adapters: int, slots: int | None
    ) -> list[LayerInput]:
        """The same with adapters, of other slots at each call as far as there are others.

        Args:
            slots: configured in the tables; None = as many as are active.
        """
        filled = FILLED_SLOTS if slots is None else min(slots, FILLED_SLOTS)
        inputs = []
        for index, layer in enumerate(base):
            first = index * adapters % (filled - adapters + 1)
            tables, first = tables_with_slots(self._tables, slots, adapters, first)
            slot = layer.routing.slot + first
            inputs.append(LayerInput(layer.x, layer.weights, layer.routing, tables, slot.int()))
        return inputs

    def _calls_that_outgrow_l2(self, tokens: int) -> int:
        expert_bytes = self.shape.expert_bytes(self._dtype.itemsize)
        touched = self.shape.active_experts(tokens) * expert_bytes
        return math.ceil(COLD_L2S * self._l2_bytes / touched)


def relative_error(captured: Captured, inputs: Sequence[LayerInput]) -> float:
    """Of what a replay writes, at random tokens, against float32: Frobenius, NaN if unwritten."""
    for out in captured.outputs:
        out.fill_(math.nan)
    captured.replay()
    of_each = math.ceil(_CHECKED_TOKENS / len(inputs))
    difference = size = 0.0
    for out, layer in zip(captured.outputs, inputs, strict=True):
        rows = torch.randperm(layer.x.shape[0], device=layer.x.device)[:of_each]
        expected = layer.reference(rows)
        difference += float((out[rows].float() - expected).square().sum())
        size += float(expected.square().sum())
    return math.sqrt(difference / max(size, 1e-30))


class AlignCalls:
    """Align with segments, for one shape's routings."""

    def __init__(
        self, shape: Shape, tokens: int, adapters: int, block_size: int, device: torch.device
    ):
        self._routings = [
            make_routing(shape, tokens, adapters, index) for index in range(_ALIGN_CALLS)
        ]
        self._block_size, self._experts = block_size, shape.experts
        calls = []
        for routing in self._routings:
            batch = LoraBatch.from_token_slot(routing.slot.to(device), ordered=True)
            ids = routing.ids.to(device)
            calls.append(partial(moe_lora_align_block_size, ids, batch, block_size, shape.experts))
        self.captured = Captured(calls, device)

    def order_is_right(self) -> bool:
        """The order of the first call; its segments are checked wherever a layer is."""
        self.captured.replay()
        result: Any = self.captured.outputs[0]
        routing = self._routings[0]
        pairs, block_expert, _ = align_reference(
            routing.ids, routing.slot, self._block_size, self._experts
        )
        rows, blocks = len(pairs), len(block_expert)
        return (
            int(result.num_blocks) == blocks
            and result.sorted_pairs[:rows].tolist() == pairs
            and result.block_expert[:blocks].tolist() == block_expert
        )
