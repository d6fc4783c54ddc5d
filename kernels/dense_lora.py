"""LoRA on dense projections (attention, shared experts), over runs of tokens with one adapter."""

from __future__ import annotations

import torch

from .checks import check
from .lora_batch import DenseSegments
from .lora_tables import DenseLoraTables
from .low_rank import LowRankTerms, add_low_rank_


def lora_linear_(
    out: torch.Tensor, x: torch.Tensor, tables: DenseLoraTables, segments: DenseSegments
) -> None:
    """out += scale * B (A x) for each projection of `tables`, in place.

    Args:
        out: [T, sum(out_sizes)], the base outputs of the P projections side by side.
        x: [T, in], their common input; dtype and device of out.
        tables: factors of the P projections.
        segments: runs of tokens with one adapter, made once a step.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device.
    """
    check("x", x, shape=(segments.num_tokens, None))
    wanted = (segments.num_tokens, sum(tables.out_sizes))
    check("out", out, shape=wanted, dtype=x.dtype, device=x.device)
    check("tables.pool", tables.pool, shape=(None,), device=x.device)
    if tables.rank.shape[1] != len(tables.out_sizes):
        raise ValueError(
            f"tables.rank must have a column for each of the {len(tables.out_sizes)} out_sizes, "
            f"got shape {list(tables.rank.shape)}"
        )
    terms = _terms(tables, segments)
    if terms is None:
        return
    if segments.order is None:
        add_low_rank_(out, x, tables.pool, terms, tables.a_transposed)
        return
    rows = out[segments.order]
    add_low_rank_(rows, x[segments.order], tables.pool, terms, tables.a_transposed)
    out[segments.order] = rows


def _terms(tables: DenseLoraTables, segments: DenseSegments) -> LowRankTerms | None:
    slot = segments.slot
    offset_a, offset_b = tables.offset_a[slot], tables.offset_b[slot]
    present = (offset_a >= 0) & (offset_b >= 0) & (tables.rank[slot] > 0)
    run, projection = present.nonzero().unbind(1)
    if run.numel() == 0:
        return None
    size = torch.tensor(tables.out_sizes, device=slot.device)
    return LowRankTerms(
        first_row=segments.first_row[run],
        end_row=segments.end_row[run],
        offset_a=offset_a[run, projection],
        offset_b=offset_b[run, projection],
        rank=tables.rank[slot][run, projection].long(),
        scale=tables.scale[slot][run, projection],
        out_first=(size.cumsum(0) - size)[projection],
        out_size=size[projection],
    )
