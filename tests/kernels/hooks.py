"""Hooks whose effect the reference knows: biases of the experts, and a factor of each pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from loraplex.kernels import LoraBatch, MoeBackend, MoeRunner

from .cases import Layer, assert_close


@dataclass
class BiasHooks:
    """What a runner with these hooks must make of a layer without biases."""

    layer: Layer
    # Pair of each row of a backend's batch, and whether the row holds one.
    pairs_of: Callable[[Any], tuple[torch.Tensor, torch.Tensor]]

    def __post_init__(self) -> None:
        experts, columns, hidden = self.layer.w13.shape
        generator = torch.Generator().manual_seed(1)
        self.w13_bias = torch.randn(experts, columns, generator=generator)
        self.w2_bias = torch.randn(experts, hidden, generator=generator)
        self.factor = torch.rand(self.layer.topk_ids.numel(), generator=generator) + 0.5
        self.calls: list[str] = []

    def after_gate_up(self, h: torch.Tensor, x: torch.Tensor, batch: Any) -> None:
        self.calls.append("after_gate_up")
        assert x is self.layer.x
        rows, expert, _ = self._rows(batch, h)
        h[rows] += self.w13_bias[expert].to(h.dtype)

    def before_combine(self, y: torch.Tensor, a: torch.Tensor, batch: Any) -> None:
        self.calls.append("before_combine")
        rows, expert, pair = self._rows(batch, y)
        assert a.shape == (y.shape[0], self.layer.w2.shape[2])
        y[rows] = (y[rows] + self.w2_bias[expert].to(y.dtype)) * self.factor[pair, None].to(y.dtype)

    def _rows(self, batch: Any, values: torch.Tensor):
        pair, here = self.pairs_of(batch)
        assert pair.shape[0] <= values.shape[0]
        rows = here.nonzero().flatten()
        expert = self.layer.topk_ids.reshape(-1)[pair[rows].long()]
        return rows, expert.long(), pair[rows].long()

    def assert_seen_by(
        self, backend: MoeBackend, lora_batch: LoraBatch | None, tolerance: float = 1e-5
    ) -> None:
        layer = self.layer
        runner = MoeRunner(backend, (self.after_gate_up,), (self.before_combine,))
        tables = layer.tables
        out = runner(layer.x, layer.weights, layer.topk_weights, layer.topk_ids, tables, lora_batch)
        assert self.calls == ["after_gate_up", "before_combine"]
        biased = replace(
            layer,
            w13_bias=self.w13_bias,
            w2_bias=self.w2_bias,
            topk_weights=layer.topk_weights * self.factor.view_as(layer.topk_weights),
        )
        expected = biased.expected_base() if lora_batch is None else biased.expected()
        assert_close(out, expected, tolerance)
