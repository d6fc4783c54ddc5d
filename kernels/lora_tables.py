"""Where the factors of every resident adapter lie: tables into one flat pool buffer.

A *slot* is the index of a resident adapter. All tables live on the device of the pool and are
read there, so that adapters come and go without a sync, a recapture or a compile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checks import FLOAT_TYPES, check

MAX_RANK = 256  # largest rank of a projection

# Bits of `ExpertLoraTables.layout`.
FUSED_GATE_UP = 1  # gate and up share one A (PEFT's fused 3D parameters)
SHARED_A13 = 2  # one gate/up A serves all experts (its offset is repeated)
SHARED_B2 = 4  # one down B serves all experts (its offset is repeated)


@dataclass
class ExpertLoraTables:
    """LoRA factors on the experts of one layer, for S slots and E experts (this rank's own).

    An offset counts elements from the start of `pool`; -1 says that the adapter leaves that
    expert's factor alone. I is this rank's share of the intermediate size. Blocks, row-major:

    - a13: [rank_gate + rank_up, H], gate rows first; with FUSED_GATE_UP [rank_gate, H] for both
    - b13: [I, rank_gate] for gate, then [I, rank_up] for up
    - a2:  [I, rank_down] (transposed, so that a cut along I is contiguous)
    - b2:  [H, rank_down]

    Gate, up: y += scale * B (A x). Down: the same with A = a2.T. Factors are finite, as uploads are
    checked to be: on a GPU several adapters share a product, in which others' rows are zero.
    """

    pool: torch.Tensor  # [elements], dtype of the factors
    offset_a13: torch.Tensor  # int64 [S, E]
    offset_b13: torch.Tensor  # int64 [S, E]
    offset_a2: torch.Tensor  # int64 [S, E]
    offset_b2: torch.Tensor  # int64 [S, E]
    rank: torch.Tensor  # int32 [S, E, 3] gate, up, down; 0 = that projection isn't adapted
    scale: torch.Tensor  # float32 [S, E, 3]
    layout: torch.Tensor  # int32 [S], bits above
    # What the pool that fills the tables promises of every adapter in them, now and later:
    max_rank: int = MAX_RANK  # no rank is larger
    rank_multiple: int = 1  # every rank and every offset is a multiple of this
    # Kernels may look for shared factors and take the short way with them. Costs other adapters
    # two small launches a layer, so it is for pools that hold many such adapters.
    shared_outer: bool = False

    def check(self, num_experts: int, device: torch.device) -> None:
        """Raise ValueError, naming the table, unless shapes and devices fit a rank's experts."""
        check("tables.pool", self.pool, shape=(None,), dtype=FLOAT_TYPES, device=device)
        check("tables.layout", self.layout, shape=(None,), dtype=torch.int32, device=device)
        shape = (self.layout.shape[0], num_experts)
        for name in ("offset_a13", "offset_b13", "offset_a2", "offset_b2"):
            table = getattr(self, name)
            check(f"tables.{name}", table, shape=shape, dtype=torch.int64, device=device)
        shape = (*shape, 3)
        check("tables.rank", self.rank, shape=shape, dtype=torch.int32, device=device)
        check("tables.scale", self.scale, shape=shape, dtype=torch.float32, device=device)
        check_max_rank(self.max_rank)


@dataclass
class DenseLoraTables:
    """LoRA factors of P dense projections that read one input (q, k, v: P = 3; o: P = 1).

    Blocks: a [rank, in], or [in, rank] where `a_transposed` (row-parallel projections, whose
    input is cut by rank); b [out_p, rank]. Offsets as in ExpertLoraTables.
    """

    pool: torch.Tensor
    offset_a: torch.Tensor  # int64 [S, P]
    offset_b: torch.Tensor  # int64 [S, P]
    rank: torch.Tensor  # int32 [S, P]; 0 = not adapted
    scale: torch.Tensor  # float32 [S, P]
    out_sizes: tuple[int, ...]  # this rank's output size of each projection
    a_transposed: bool = False
    max_rank: int = MAX_RANK
    rank_multiple: int = 1


def check_max_rank(max_rank: int) -> None:
    if not 1 <= max_rank <= MAX_RANK:
        raise ValueError(f"tables.max_rank must be from 1 to {MAX_RANK}, got {max_rank}")
