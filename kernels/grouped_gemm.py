"""The experts' base GEMMs over rows that are ordered by expert."""

from __future__ import annotations

import torch


def grouped_mm(
    rows: torch.Tensor, weights: torch.Tensor, expert_first_row: torch.Tensor
) -> torch.Tensor:
    """rows [n, in], weights [E, out, in], expert_first_row int32 [E + 1] -> [n, out]."""
    out = rows.new_empty(rows.shape[0], weights.shape[1])
    bounds = expert_first_row.tolist()
    for expert, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if first < end:
            torch.mm(rows[first:end], weights[expert].t(), out=out[first:end])
    return out
