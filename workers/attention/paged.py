"""Attention over the paged KV cache by its kernels, for GPUs: what the host tells them of a step.

Everything travels in one copy from pinned memory. Torch keeps that memory until the copy is done,
so a later step may be laid out while an earlier one still runs.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch

from ...kernels import TILE_TOKENS, PagedSequences, paged_attention, qkv_prepare, write_kv
from ..errors import WorkerError
from ..host_copies import to_device
from ..step import SequenceStep
from .buckets import pow2

_ALIGNMENT = 32  # int32 elements, 128 bytes: kernels are compiled for starts at multiples of 16


class PagedBatch:
    """An `AttentionBatch` of device tensors."""

    def __init__(self, sequences: PagedSequences):
        self.sequences = sequences

    @classmethod
    def plan(
        cls, sequences: list[SequenceStep], block_size: int, device: torch.device
    ) -> PagedBatch:
        """Lays out one step's attention."""
        n = len(sequences)
        new = np.fromiter((len(s.token_ids) for s in sequences), np.int32, n)
        start = np.fromiter((s.start for s in sequences), np.int32, n)
        lengths = start + new
        block_start, blocks = _blocks_of(sequences, lengths, block_size)
        query_start = np.zeros(n + 1, np.int32)
        np.cumsum(new, out=query_start[1:])
        in_sequence = np.arange(query_start[-1], dtype=np.int32)
        in_sequence -= np.repeat(query_start[:-1], new)
        slots = _slots(
            blocks, np.repeat(block_start, new), np.repeat(start, new) + in_sequence, block_size
        )
        decode = np.flatnonzero(new == 1).astype(np.int32)
        longest = int(lengths[decode].max()) if len(decode) else 0
        arrays = {
            "query_start": query_start,
            "seq_lens": lengths,
            "block_start": block_start,
            "blocks": blocks,
            "write_slots": slots,
            "decode": decode,
            "prefill": _prefill_tiles(new, lengths).reshape(-1, 2),
        }
        there = to_device(arrays, device)
        return cls(PagedSequences(**there, max_context=pow2(longest)))

    def write(
        self, k: torch.Tensor, v: torch.Tensor | None, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> None:
        write_kv(k, v, k_cache, v_cache, self.sequences.write_slots)

    def prepare(
        self,
        qkv: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        """`kernels.qkv_prepare` with this step's slots; cos and sin are [T, 1, D]."""
        return qkv_prepare(
            qkv, k_cache, v_cache, self.sequences.write_slots, cos[:, 0], sin[:, 0],
            q_weight, k_weight, eps,
        )  # fmt: skip

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scale: float,
        window: int | None,
        sinks: torch.Tensor | None,
        latent: bool,
    ) -> torch.Tensor:
        return paged_attention(
            q, k_cache, v_cache, self.sequences,
            scale=scale, window=window, sinks=sinks, latent=latent,
        )  # fmt: skip


class DecodeBuffers:
    """Device memory that decode steps are laid out in, at addresses that a captured graph may keep.

    Buckets of different sizes look at the same memory: `fill` once, then replay the graph that was
    captured on the batch of the step's bucket.
    """

    def __init__(self, max_sequences: int, max_blocks: int, block_size: int, device: torch.device):
        """
        Args:
            max_sequences: rows of the largest bucket.
            max_blocks: most blocks that all sequences of a step have together, shared ones counted
                by each.
        """
        self.max_sequences, self.max_blocks = max_sequences, max_blocks
        self._block_size, self._device = block_size, device
        # Blocks last: a step overwrites one range from the beginning, as far as it has blocks.
        sizes = (max_sequences, max_sequences, max_sequences, max_blocks)
        offsets = _offsets(sizes)
        self._memory = torch.zeros(offsets[-1], dtype=torch.int32, device=device)
        parts = [self._memory[o : o + size] for o, size in zip(offsets[:-1], sizes, strict=True)]
        self._seq_lens, self._write_slots, self._block_start, self._blocks = parts
        self._blocks_at = offsets[3]
        self._rows = torch.arange(max_sequences + 1, dtype=torch.int32, device=device)
        self.fill([])

    def batch(self, size: int, max_context: int) -> PagedBatch:
        """What a decode step of `size` rows reads: the first ones of this memory.

        Args:
            size: rows, of which those behind a step's sequences are padding.
            max_context: most tokens of a sequence. Decides how keys are shared among programs.

        Raises:
            WorkerError: there are fewer rows.
        """
        if not 0 < size <= self.max_sequences:
            raise WorkerError(
                f"a decode bucket has 1 to {self.max_sequences} sequences, not {size}"
            )
        return PagedBatch(
            PagedSequences(
                query_start=self._rows[: size + 1],
                seq_lens=self._seq_lens[:size],
                block_start=self._block_start[:size],
                blocks=self._blocks,
                write_slots=self._write_slots[:size],
                decode=self._rows[:size],
                prefill=self._rows[:0].view(0, 2),
                max_context=max_context,
            )
        )

    def fill(self, sequences: list[SequenceStep]) -> None:
        """Lays out a step of sequences with one new token each, in one copy. Rows behind them are
        padding: nothing is written for them, and their attention is zero.

        Raises:
            WorkerError: too many sequences or blocks, or a sequence with other than one new token.
        """
        n = len(sequences)
        if n > self.max_sequences:
            raise WorkerError(f"{n} sequences; there is room for {self.max_sequences}")
        if any(len(s.token_ids) != 1 for s in sequences):
            raise WorkerError("a decode step's sequences have one new token each")
        start = np.fromiter((s.start for s in sequences), np.int32, n)
        block_start, blocks = _blocks_of(sequences, start + 1, self._block_size)
        if len(blocks) > self.max_blocks:
            raise WorkerError(f"{len(blocks)} blocks; there is room for {self.max_blocks}")
        host = torch.empty(
            self._blocks_at + len(blocks), dtype=torch.int32, pin_memory=self._device.type == "cuda"
        )
        array = host.numpy()
        rows = array[: self._blocks_at].reshape(3, -1)
        rows[0] = rows[2] = 0
        rows[1] = -1
        rows[0, :n] = start + 1
        rows[1, :n] = _slots(blocks, block_start, start, self._block_size)
        rows[2, :n] = block_start
        array[self._blocks_at :] = blocks
        self._memory[: len(array)].copy_(host, non_blocking=True)


def _blocks_of(
    sequences: list[SequenceStep], lengths: np.ndarray, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """int32 [S], where each sequence's blocks begin, and the blocks of all, as many as are used."""
    used = -(-lengths // block_size)
    ends = np.cumsum(used, dtype=np.int32)
    lists = (s.blocks[:count] for s, count in zip(sequences, used.tolist(), strict=True))
    total = int(ends[-1]) if len(ends) else 0
    return ends - used, np.fromiter(chain.from_iterable(lists), np.int32, total)


def _slots(
    blocks: np.ndarray, block_start: np.ndarray, position: np.ndarray, block_size: int
) -> np.ndarray:
    """Cache slots of tokens at `position` of sequences whose blocks begin at `block_start`."""
    return blocks[block_start + position // block_size] * block_size + position % block_size


def _prefill_tiles(new: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int32 [P * 2] of (sequence, first token), those with most keys to see first: what starts last
    should be short."""
    tiles = np.where(new == 1, 0, -(-new // TILE_TOKENS))
    sequence = np.repeat(np.arange(len(new), dtype=np.int32), tiles)
    first = np.arange(len(sequence), dtype=np.int32)
    first -= np.repeat(np.cumsum(tiles) - tiles, tiles).astype(np.int32)
    first *= TILE_TOKENS
    order = np.argsort((new - lengths)[sequence] - first, kind="stable")
    return np.stack([sequence, first], 1)[order].reshape(-1)


def _offsets(sizes: tuple[int, ...]) -> list[int]:
    """Aligned starts of parts of so many elements that follow each other, and the end."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return offsets
