"""LoRA's launches: shrink, and expand as a pass of its own, on experts and dense projections."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
import triton.language as tl

from ..aligned import AlignedBatch
from ..lora_batch import LoraBatch
from ..lora_tables import FUSED_GATE_UP, DenseLoraTables, ExpertLoraTables
from .align import align
from .expand_add import expand_add_kernel
from .launch import USE_PDL, cdiv, next_power_of_2
from .shrink import DENSE, DOWN, GATE_UP, shrink_kernel
from .tiles import GemmTile, ShrinkTile

MAX_PROJECTIONS = 4  # dense projections that read one input
BESIDE_TOKENS = 256  # up to so many tokens, a dense shrink runs beside the base product
TRITON_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@dataclass(frozen=True)
class Shrunk:
    """s of every adapted row, and for each block and part (gate, up; or a dense projection) the
    list of B's groups of ranks that it is to be multiplied with."""

    pool: torch.Tensor
    s: torch.Tensor  # [splits, rows, parts * part_stride], scaled; float32 if there are splits
    part_stride: int
    count: torch.Tensor  # int32 [blocks * parts], groups of each list
    groups: torch.Tensor  # int64 [lists * list_length], packed as expand.py says
    row_groups: torch.Tensor  # int32 [parts, rows], first and end of each row's own groups
    list_length: int
    aligned: bool  # factors can be read 16 bytes at a time

    @property
    def splits(self) -> int:
        return self.s.shape[0]

    @property
    def lists(self) -> tuple:
        """Kernel arguments."""
        return self.count, self.groups, self.row_groups, self.list_length, self.row_groups.shape[1]


def batch_args(batch: AlignedBatch) -> tuple[torch.Tensor, ...]:
    return (batch.sorted_pairs, batch.block_expert, batch.block_end, batch.num_blocks)


def expand_args(shrunk: Shrunk | None, any_pointer: torch.Tensor) -> tuple:
    """What a product that adds LoRA in takes; without LoRA any pointer stands in."""
    if shrunk is None:
        return (any_pointer,) * 5 + (0, 0, 0, 0)
    return (shrunk.pool, shrunk.s, *shrunk.lists, shrunk.s.stride(1), shrunk.s.stride(0))


def expand_flags(shrunk: Shrunk | None, tile: GemmTile) -> dict:
    return {
        "LORA": shrunk is not None,
        "ALIGNED": shrunk is not None and shrunk.aligned,
        "SPLITS": 1 if shrunk is None else shrunk.splits,
        "EK": tile.expand_k,
        "AHEAD": shrunk is not None and tile.expand_ahead,
        "EXPAND_STAGES": tile.expand_stages,
    }


def shrink_gate_up(
    x: torch.Tensor,
    intermediate: int,
    batch: AlignedBatch,
    tables: ExpertLoraTables,
    tile: ShrinkTile,
    shared_bit: int = 0,
) -> Shrunk:
    """scale * A13 x of each adapted row, gate and up; x [T, H]. Rows of adapters with `shared_bit`
    are left for another kernel to fill."""
    offsets = (tables.offset_a13, tables.offset_b13)
    return _shrink(x, batch, tables, offsets, GATE_UP, 2, intermediate, False, tile, shared_bit)


def shrink_down(
    a: torch.Tensor,
    batch: AlignedBatch,
    tables: ExpertLoraTables,
    tile: ShrinkTile,
    shared_bit: int = 0,
) -> Shrunk:
    """scale * A2 a of each adapted row; a [rows, I]. Adapters with `shared_bit` aren't listed for
    the expand."""
    offsets = (tables.offset_a2, tables.offset_b2)
    return _shrink(a, batch, tables, offsets, DOWN, 1, 0, True, tile, shared_bit)


def _shrink(
    x, batch, tables, offsets, kind, parts: int, gate_size: int, transposed: bool, tile,
    shared_bit: int = 0,
) -> Shrunk:  # fmt: skip
    part_stride = -(-tables.max_rank // 16) * 16
    list_length = batch.block_size * (part_stride // 16)
    lists = batch.max_blocks * parts
    s = torch.empty(
        tile.splits, batch.max_blocks * batch.block_size, parts * part_stride,
        dtype=x.dtype if tile.splits == 1 else torch.float32, device=x.device,
    )  # fmt: skip
    groups = torch.empty(lists * list_length, dtype=torch.int64, device=x.device)
    row_groups = torch.empty(parts, s.shape[1], dtype=torch.int32, device=x.device)
    count = torch.empty(lists, dtype=torch.int32, device=x.device)
    shrunk = Shrunk(
        tables.pool, s, part_stride, count, groups, row_groups, list_length,
        tables.rank_multiple % 8 == 0,
    )  # fmt: skip
    layout = tables.layout if isinstance(tables, ExpertLoraTables) else tables.rank
    segments = batch.segments
    projections = parts if kind == DENSE else 1
    # One A for gate and up has one part's ranks, others have both parts'.
    ranks_at_once = part_stride * (2 if kind == GATE_UP else 1)
    grid = (batch.max_blocks * (tile.groups + 1), projections, tile.splits)
    shrink_kernel[grid](
        x, *batch_args(batch), segments.count, segments.slot, segments.first_row,
        tables.pool, *offsets, tables.rank, tables.scale, layout, s, *shrunk.lists,
        x.shape[1], gate_size, batch.top_k, offsets[0].shape[1], x.stride(0), s.stride(1),
        s.stride(0), part_stride,
        KIND=kind, A_TRANSPOSED=transposed, FUSED_BIT=FUSED_GATE_UP, SHARED_BIT=shared_bit,
        ALIGNED=shrunk.aligned, PROGRAMS=tile.groups, SPLITS=tile.splits, BM=batch.block_size,
        ROWS=tile.rows, BR=min(32, next_power_of_2(ranks_at_once)), BK=tile.block_k, PDL=USE_PDL,
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=USE_PDL,
    )  # fmt: skip
    return shrunk


def expand_(
    out: torch.Tensor, shrunk: Shrunk, batch: AlignedBatch, sizes: tuple[int, ...], by_token: bool
) -> None:
    """out += s B^T in a pass of its own; parts of `sizes` columns lie side by side in out."""
    block_n, tiles = (64, 8) if batch.block_size >= 64 else (128, 1)
    sizes = (*sizes, *(0,) * (MAX_PROJECTIONS - len(sizes)))
    chunks = sum(cdiv(size, block_n * tiles) for size in sizes)
    expand_add_kernel[batch.max_blocks, chunks](
        out, batch.sorted_pairs, batch.block_end, batch.num_blocks,
        shrunk.pool, shrunk.s, *shrunk.lists, shrunk.s.stride(1), shrunk.s.stride(0),
        shrunk.part_stride, *sizes, shrunk.row_groups.shape[0], out.stride(0),
        BY_TOKEN=by_token, ALIGNED=shrunk.aligned, SPLITS=shrunk.splits, EK=32,
        BM=batch.block_size, BN=block_n, TILES=tiles, DTYPE=TRITON_TYPES[out.dtype], PDL=USE_PDL,
        num_warps=4, launch_pdl=USE_PDL,
    )  # fmt: skip


def lora_linear_(
    out: torch.Tensor, x: torch.Tensor, tables: DenseLoraTables, lora_batch: LoraBatch
) -> None:
    """`kernels.lora_linear_` in two launches, whatever the number of projections."""
    _check_dense(out, tables)
    if x.shape[0]:
        expand_(out, *_shrink_dense(x, tables, lora_batch), tables.out_sizes, by_token=True)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tables: DenseLoraTables,
    lora_batch: LoraBatch,
) -> torch.Tensor:
    """`kernels.lora_linear`. Few tokens leave most of a GPU idle: the shrink then runs beside the
    base product, on a stream of its own."""
    if x.device.type != "cuda" or not 0 < x.shape[0] <= BESIDE_TOKENS:
        out = F.linear(x, weight, bias)
        lora_linear_(out, x, tables, lora_batch)
        return out
    main, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
    # What the side stream allocates it uses again only after such a wait.
    side.wait_stream(main)
    with torch.cuda.stream(side):
        shrunk = _shrink_dense(x, tables, lora_batch)
    out = F.linear(x, weight, bias)
    _check_dense(out, tables)
    main.wait_stream(side)
    expand_(out, *shrunk, tables.out_sizes, by_token=True)
    return out


def _check_dense(out: torch.Tensor, tables: DenseLoraTables) -> None:
    if len(tables.out_sizes) > MAX_PROJECTIONS:
        raise ValueError(
            f"tables.out_sizes must have at most {MAX_PROJECTIONS} projections, "
            f"got {len(tables.out_sizes)}"
        )
    if out.shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(f"out must have its columns side by side, got strides {out.stride()}")


def _shrink_dense(
    x: torch.Tensor, tables: DenseLoraTables, lora_batch: LoraBatch
) -> tuple[Shrunk, AlignedBatch]:
    """scale * A x of each projection, and the token blocks that its rows stand in."""
    if x.stride(1) != 1:
        x = x.contiguous()
    block_size, tile = _dense_tile(x.shape[0], x.shape[1], lora_batch.num_adapters)
    batch = token_blocks(lora_batch, block_size)
    offsets = (tables.offset_a, tables.offset_b)
    projections = len(tables.out_sizes)
    shrunk = _shrink(x, batch, tables, offsets, DENSE, projections, 0, tables.a_transposed, tile)
    return shrunk, batch


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def token_blocks(lora_batch: LoraBatch, block_size: int) -> AlignedBatch:
    """The tokens in blocks with their runs of one slot: pairs of one expert. Made once a step."""
    if block_size not in lora_batch.token_blocks:
        slots = lora_batch.token_slot
        one_expert = torch.zeros(slots.shape[0], 1, dtype=torch.int32, device=slots.device)
        lora_batch.token_blocks[block_size] = align(one_expert, lora_batch, block_size, 1)
    return lora_batch.token_blocks[block_size]


def _dense_tile(num_tokens: int, inner: int, adapters: int) -> tuple[int, ShrinkTile]:
    """Block size of the tokens, and the shrink's tile: measured on an H100 at hidden size 2048."""
    if num_tokens <= 256:
        # Few programs otherwise: 256 tokens are 16 blocks. Blocks of many adapters have a run, and
        # so a factor to read, for each.
        splits = 4 if inner >= 1024 else 1
        return 16, ShrinkTile(4 if adapters <= 8 else 16, 16, 128, splits)
    if num_tokens <= 2048:
        return 32, ShrinkTile(2, 32, 128, 2)
    return 128, ShrinkTile(2, 64, 64, 1)
