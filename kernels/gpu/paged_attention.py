"""Attention over a paged KV cache: tiles, splits and launches."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from ..paged_sequences import TILE_TOKENS, PagedSequences
from .attention_kernels import attention_kernel, reduce_kernel, write_kernel
from .launch import USE_PDL, cdiv, next_power_of_2

MIN_SHARE = 256  # keys; below it the pass that puts splits together costs more than they save
MAX_SPLITS = 64
# Contexts from which on sequences of one batch may differ so much that more programs than
# multiprocessors, each with less to do, end sooner.
LONG_CONTEXT = 4096
LONG_CONTEXT_WAVES = 4
WRITE_COLUMNS = 1024
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class AttentionTile:
    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class HeadShape:
    """G query heads per KV head; columns of keys, cut into powers of two, and of values."""

    group: int
    d: int
    dv: int
    latent: bool

    @property
    def d1(self) -> int:
        """The largest power of two within d; at least 16, which products need."""
        return max(16, 1 << (self.d.bit_length() - 1))

    @property
    def d2(self) -> int:
        """Columns of the rest, padded; 0: none."""
        return max(16, next_power_of_2(self.d - self.d1)) if self.d > self.d1 else 0

    @property
    def dvp(self) -> int:
        return max(16, next_power_of_2(self.dv))

    @property
    def keys_are_values(self) -> bool:
        return self.latent and self.dv == self.d1


def decode_tile(shape: HeadShape, itemsize: int) -> AttentionTile:
    """Tile for sequences of one new token, whose rows are the heads of a group.

    The stages leave two tiles of keys and values on their way where shared memory allows: block
    numbers take the first stage, so three stages mean one tile.
    """
    rows = min(max(16, next_power_of_2(shape.group)), 64)
    if itemsize > 2:
        return AttentionTile(min(rows, 16), 16 if shape.d > 256 else 32, 4, 3)
    if shape.d > 256:
        return AttentionTile(rows, 32 if rows > 16 else 64, 8, 3)
    return AttentionTile(rows, 64, 4, 3 if shape.d > 128 else 5)


def prefill_tile(shape: HeadShape, itemsize: int) -> AttentionTile:
    """Tile for chunks of a prompt."""
    if itemsize > 2:
        return AttentionTile(16, 16 if shape.d > 128 else 32, 4, 3)
    if shape.d > 256:
        return AttentionTile(64, 32, 8, 3)
    if max(shape.d, shape.dvp) > 192:
        return AttentionTile(128, 32, 8, 3)
    if 64 < shape.d <= 128:
        return AttentionTile(128, 32, 4, 3)  # measured on an H100, heads of 128
    return AttentionTile(128, 64, 8, 3 if shape.d > 128 else 5)


def decode_splits(programs: int, max_context: int, multiprocessors: int) -> int:
    """Among how many programs the keys of a decode sequence are shared, at most.

    A function of the launch's shape alone, so that a captured graph serves every later step: the
    programs find on the device which of them a sequence has keys for.

    Args:
        programs: as many as run without splits.
        max_context: the sequence sees no more keys.
    """
    wanted = multiprocessors * (LONG_CONTEXT_WAVES if max_context > LONG_CONTEXT else 1)
    return max(1, min(wanted // programs, cdiv(max_context, MIN_SHARE), MAX_SPLITS))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # Triton's interpreter: as an H100
    return torch.cuda.get_device_properties(device).multi_processor_count


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    sequences: PagedSequences,
    scale: float,
    window: int | None,
    sinks: torch.Tensor | None,
    latent: bool,
) -> torch.Tensor:
    """`kernels.paged_attention`: one launch for decode sequences, a second one where their keys are
    split, and one for prefill."""
    tokens, heads, d = q.shape
    kv_heads, dv = v_cache.shape[2:]
    shape = HeadShape(heads // kv_heads, d, dv, latent)
    out = torch.empty(tokens, heads * dv, dtype=q.dtype, device=q.device)
    prefill_items, decode_items = sequences.prefill.shape[0], sequences.decode.shape[0]

    def launch(tile, items, row_tiles, splits, short_splits, parts, decode) -> None:
        grid = (row_tiles * splits, kv_heads, items.shape[0])
        attention_kernel[grid](
            q, k_cache, v_cache, q if sinks is None else sinks, out, *parts,
            sequences.blocks, sequences.block_start, sequences.query_start, sequences.seq_lens,
            items, scale * _LOG2_E, window or 0, heads, short_splits,
            q.stride(0), q.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3],
            G=shape.group, D1=shape.d1, D2=shape.d2, D=d, DV=dv, DVP=shape.dvp,
            KEYS_ARE_VALUES=shape.keys_are_values, WINDOW=window is not None,
            SINKS=sinks is not None, DECODE=decode,
            # Two loops over the longest rows would need more registers than there are.
            TWO_LOOPS=not decode and window is None and d <= 256,
            SPLIT=splits > 1, LONG=LONG_CONTEXT, MIN_SHARE=MIN_SHARE,
            TILE_TOKENS=1 if decode else TILE_TOKENS, ROW_TILES=row_tiles,
            BLOCK_SIZE=k_cache.shape[1], BM=tile.rows, BN=tile.keys, PDL=USE_PDL,
            num_warps=tile.warps, num_stages=tile.stages, launch_pdl=USE_PDL,
        )  # fmt: skip

    if prefill_items:
        tile = prefill_tile(shape, q.element_size())
        row_tiles = cdiv(TILE_TOKENS * shape.group, tile.rows)
        launch(tile, sequences.prefill, row_tiles, 1, 1, (out, out), False)
    if decode_items:
        tile = decode_tile(shape, q.element_size())
        row_tiles = cdiv(shape.group, tile.rows)
        seen = min(sequences.max_context, window or sequences.max_context)
        programs = decode_items * kv_heads * row_tiles
        splits = decode_splits(programs, seen, _multiprocessors(q.device))
        if splits == 1:
            launch(tile, sequences.decode, row_tiles, 1, 1, (out, out), True)
            return out
        short_splits = decode_splits(programs, min(seen, LONG_CONTEXT), _multiprocessors(q.device))
        on_device = {"dtype": torch.float32, "device": q.device}
        part_acc = torch.empty(decode_items, heads, splits, dv, **on_device)
        part_stats = torch.empty(decode_items, heads, splits, 2, **on_device)
        parts = (part_acc, part_stats)
        launch(tile, sequences.decode, row_tiles, splits, short_splits, parts, True)
        reduce_kernel[(heads, decode_items)](
            *parts, sequences.query_start, sequences.seq_lens, sequences.decode, out, window or 0,
            heads, splits, short_splits, DV=dv, DVP=shape.dvp, WINDOW=window is not None,
            LONG=LONG_CONTEXT, MIN_SHARE=MIN_SHARE, BN=tile.keys, PDL=USE_PDL,
            num_warps=4, launch_pdl=USE_PDL,
        )  # fmt: skip
    return out


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    write_slots: torch.Tensor,
) -> None:
    """`kernels.write_kv` in one launch."""
    kv_heads, d = k_cache.shape[2:]
    dv = v_cache.shape[3]
    width = kv_heads * max(d, dv)
    columns = min(WRITE_COLUMNS, next_power_of_2(width))
    new_v = k if v is None else v
    write_kernel[(write_slots.shape[0], cdiv(width, columns))](
        k, new_v, k_cache, v_cache, write_slots, *k.stride()[:2], *new_v.stride()[:2],
        *k_cache.stride()[:3], *v_cache.stride()[:3],
        KV_HEADS=kv_heads, D=d, DV=dv, WRITE_V=v is not None, BLOCK_SIZE=k_cache.shape[1],
        BLOCK=columns, PDL=USE_PDL, num_warps=4, launch_pdl=USE_PDL,
    )  # fmt: skip
