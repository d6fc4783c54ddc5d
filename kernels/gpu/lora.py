"""LoRA's launches: shrink, and expand as a pass of its own, on experts and dense projections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..aligned import AlignedBatch
from ..lora_batch import LoraBatch
from ..lora_tables import FUSED_GATE_UP, DenseLoraTables, ExpertLoraTables
from .align import align
from .expand_add import expand_add_kernel
from .launch import USE_PDL, next_power_of_2
from .shrink import DENSE, DOWN, GATE_UP, shrink_kernel
from .tiles import ShrinkTile

MAX_PROJECTIONS = 4  # dense projections that read one input
TRITON_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@dataclass(frozen=True)
class Shrunk:
    """s of every adapted row: float32 [splits, rows, columns], parts of one sum; unscaled."""

    s: torch.Tensor
    column_stride: int  # columns from one dense projection to the next

    @property
    def splits(self) -> int:
        return self.s.shape[0]

    @property
    def row_stride(self) -> int:
        return self.s.stride(1)

    @property
    def split_stride(self) -> int:
        return self.s.stride(0)


def batch_args(batch: AlignedBatch) -> tuple[torch.Tensor, ...]:
    """A batch as kernels take it; without segments any pointer stands in for theirs."""
    segments = batch.segments
    lists = (
        (batch.num_blocks,) * 3
        if segments is None
        else (segments.count, segments.slot, segments.first_row)
    )
    return (batch.sorted_pairs, batch.block_expert, batch.block_end, batch.num_blocks, *lists)


def rank_chunk(max_rank: int) -> int:
    """Ranks that an expand's dot takes at a time: 16 is the least that tensor cores take."""
    return min(64, max(16, next_power_of_2(max_rank)))


def is_aligned(tables: ExpertLoraTables | DenseLoraTables) -> bool:
    """Whether factors can be read 16 bytes at a time."""
    return tables.rank_multiple % 8 == 0


def shrink_gate_up(
    x: torch.Tensor, batch: AlignedBatch, tables: ExpertLoraTables, tile: ShrinkTile
) -> Shrunk:
    """A13 x of each adapted row; x [T, H]."""
    offsets = (tables.offset_a13, tables.offset_b13)
    return _shrink(x, batch, tables, offsets, GATE_UP, 2 * tables.max_rank, 1, False, tile)


def shrink_down(
    a: torch.Tensor, batch: AlignedBatch, tables: ExpertLoraTables, tile: ShrinkTile
) -> Shrunk:
    """A2 a of each adapted row; a [rows, I]."""
    offsets = (tables.offset_a2, tables.offset_b2)
    return _shrink(a, batch, tables, offsets, DOWN, tables.max_rank, 1, True, tile)


def _shrink(
    x, batch, tables, offsets, kind, columns: int, projections: int, transposed: bool, tile
) -> Shrunk:
    columns = -(-columns // 8) * 8
    rows = batch.max_blocks * batch.block_size
    s = torch.empty(
        tile.splits, rows, projections * columns, dtype=torch.float32, device=x.device
    )
    layout = tables.layout if isinstance(tables, ExpertLoraTables) else tables.rank
    grid = (batch.max_blocks * tile.groups, projections, tile.splits)
    shrink_kernel[grid](
        x, *batch_args(batch), tables.pool, *offsets, tables.rank, layout, s,
        x.shape[1], batch.top_k, offsets[0].shape[1], x.stride(0), s.stride(1), s.stride(0),
        columns,
        KIND=kind, A_TRANSPOSED=transposed, FUSED_BIT=FUSED_GATE_UP, ALIGNED=is_aligned(tables),
        GROUPS=tile.groups, SPLITS=tile.splits, BM=batch.block_size, ROWS=tile.rows,
        BR=min(64, max(16, next_power_of_2(columns))), BK=tile.block_k, PDL=USE_PDL,
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=USE_PDL,
    )  # fmt: skip
    return Shrunk(s, columns)


def expand_gate_up_(
    h: torch.Tensor, shrunk: Shrunk, batch: AlignedBatch, tables: ExpertLoraTables
) -> None:
    """h [rows, 2I] += scale * B13 s."""
    offsets = (tables.offset_a13, tables.offset_b13)
    half = h.shape[1] // 2
    _expand_(h, shrunk, batch, tables, offsets, tables.layout, GATE_UP, (half, half), 0)


def expand_down_(
    y: torch.Tensor, shrunk: Shrunk, batch: AlignedBatch, tables: ExpertLoraTables
) -> None:
    """y [rows, H] += scale * B2 s."""
    offsets = (tables.offset_a2, tables.offset_b2)
    _expand_(y, shrunk, batch, tables, offsets, tables.layout, DOWN, (y.shape[1],), 0)


def _expand_(out, shrunk, batch, tables, offsets, layout, kind, sizes, column_stride) -> None:
    block_n = 64 if batch.block_size >= 64 else 128
    grid = (batch.max_blocks, triton.cdiv(max(sizes), block_n), len(sizes))
    expand_add_kernel[grid](
        out, *batch_args(batch), tables.pool, *offsets, tables.rank, tables.scale, layout,
        shrunk.s, *sizes, *(0,) * (MAX_PROJECTIONS - len(sizes)), offsets[0].shape[1],
        out.stride(0), shrunk.row_stride, shrunk.split_stride, column_stride,
        KIND=kind, FUSED_BIT=FUSED_GATE_UP, ALIGNED=is_aligned(tables), SPLITS=shrunk.splits,
        RC=rank_chunk(tables.max_rank), BM=batch.block_size, BN=block_n,
        DTYPE=TRITON_TYPES[out.dtype], PDL=USE_PDL, num_warps=4, launch_pdl=USE_PDL,
    )  # fmt: skip


def lora_linear_(
    out: torch.Tensor, x: torch.Tensor, tables: DenseLoraTables, lora_batch: LoraBatch
) -> None:
    """`kernels.lora_linear_` in two launches, whatever the number of projections."""
    if len(tables.out_sizes) > MAX_PROJECTIONS:
        raise ValueError(
            f"tables.out_sizes must have at most {MAX_PROJECTIONS} projections, "
            f"got {len(tables.out_sizes)}"
        )
    num_tokens = x.shape[0]
    if num_tokens == 0:
        return
    block_size, tile = _dense_tile(num_tokens, x.shape[1])
    batch = token_blocks(lora_batch, block_size)
    offsets = (tables.offset_a, tables.offset_b)
    shrunk = _shrink(
        x, batch, tables, offsets, DENSE, tables.max_rank, len(tables.out_sizes),
        tables.a_transposed, tile,
    )  # fmt: skip
    _expand_(
        out, shrunk, batch, tables, offsets, tables.rank, DENSE, tables.out_sizes,
        shrunk.column_stride,
    )  # fmt: skip


def token_blocks(lora_batch: LoraBatch, block_size: int) -> AlignedBatch:
    """The tokens in blocks with their runs of one slot: pairs of one expert. Made once a step."""
    if block_size not in lora_batch.token_blocks:
        slots = lora_batch.token_slot
        one_expert = torch.zeros(slots.shape[0], 1, dtype=torch.int32, device=slots.device)
        lora_batch.token_blocks[block_size] = align(one_expert, lora_batch, block_size, 1)
    return lora_batch.token_blocks[block_size]


def _dense_tile(num_tokens: int, inner: int) -> tuple[int, ShrinkTile]:
    """Block size of the tokens, and the shrink's tile."""
    if num_tokens <= 256:
        # Few programs otherwise: 256 tokens are 16 blocks.
        splits = 4 if inner >= 1024 else 1
        return 16, ShrinkTile(4, 16, 128, splits)
    if num_tokens <= 2048:
        return 32, ShrinkTile(2, 32, 128, 2)
    return 64, ShrinkTile(2, 64, 64, 1)
