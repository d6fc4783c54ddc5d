"""Attention over the paged KV cache in plain torch: prefill chunks and decode in one batch.

Sequences of similar shape (new tokens, context blocks; both rounded up to powers of two) are
padded together and go through one scaled_dot_product_attention each.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .step import SequenceStep


@dataclass
class _Bucket:
    """B sequences of up to Q new tokens over up to N blocks (S = N * block_size keys)."""

    rows: torch.Tensor  # int64 [B * Q], row of the batch; padding repeats the last row
    out_index: torch.Tensor | None  # int64 [valid], rows of [B * Q] that aren't padding; None: all
    out_rows: torch.Tensor  # int64 [valid], rows of the batch they belong to
    blocks: torch.Tensor  # int64 [B * N]
    mask: torch.Tensor  # bool [B, 1, G * Q, S], True where a query may look
    shape: tuple[int, int, int]  # B, Q, N


@dataclass
class AttentionBatch:
    """What all layers of a step share."""

    write_slots: torch.Tensor  # int64 [T], block * block_size + offset of each new token
    buckets: list[_Bucket]


def _pow2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def plan_attention(
    sequences: list[SequenceStep], block_size: int, group_heads: int, device: torch.device
) -> AttentionBatch:
    """Lays out one step's attention.

    Args:
        sequences: in batch order; their rows follow each other.
        group_heads: query heads per KV head (G).
    """
    write: list[torch.Tensor] = []
    by_shape: dict[tuple[int, int], list[tuple[int, SequenceStep]]] = defaultdict(list)
    row = 0
    for seq in sequences:
        n, start = len(seq.token_ids), seq.start
        pos = torch.arange(start, start + n)
        table = torch.tensor(seq.blocks)
        write.append(table[pos // block_size] * block_size + pos % block_size)
        used_blocks = -(-(start + n) // block_size)
        by_shape[_pow2(n), _pow2(used_blocks)].append((row, seq))
        row += n
    buckets = [
        _bucket(members, q, nb, block_size, group_heads, device)
        for (q, nb), members in by_shape.items()
    ]
    return AttentionBatch(torch.cat(write).to(device), buckets)


def _bucket(
    members: list[tuple[int, SequenceStep]],
    q: int,
    nb: int,
    block_size: int,
    group_heads: int,
    device: torch.device,
) -> _Bucket:
    b = len(members)
    first = torch.tensor([row for row, _ in members])[:, None]
    n = torch.tensor([len(s.token_ids) for _, s in members])[:, None]
    start = torch.tensor([s.start for _, s in members])[:, None]
    i = torch.arange(q)[None, :]
    rows = first + torch.minimum(i, n - 1)  # [B, Q]
    q_pos = start + torch.minimum(i, n - 1)
    padded = [(s.blocks[:nb] + [0] * nb)[:nb] for _, s in members]
    key_pos = torch.arange(nb * block_size)
    mask = key_pos[None, None, :] <= q_pos[:, :, None]  # [B, Q, S]
    mask = mask[:, None, None].expand(b, 1, group_heads, q, nb * block_size)
    valid = (i < n).reshape(-1)
    whole = bool(valid.all())
    flat = rows.reshape(-1)
    return _Bucket(
        rows=flat.to(device),
        out_index=None if whole else valid.nonzero()[:, 0].to(device),
        out_rows=(flat if whole else flat[valid]).to(device),
        blocks=torch.tensor(padded).reshape(-1).to(device),
        mask=mask.reshape(b, 1, group_heads * q, nb * block_size).to(device),
        shape=(b, q, nb),
    )


class PagedKVCache:
    """Keys and values of all layers: [L, blocks, block_size, KVH, D] each."""

    def __init__(
        self,
        layers: int,
        blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        shape = (layers, blocks, block_size, kv_heads, head_dim)
        # Zeros, not empty: padded keys are masked, but 0 * NaN of old memory would still be NaN.
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def clear(self) -> None:
        self.k.zero_()
        self.v.zero_()

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: AttentionBatch,
    ) -> torch.Tensor:
        """Writes k and v to the cache, then attends.

        Args:
            q: [T, H, D] with rope applied; k, v: [T, KVH, D].

        Returns:
            [T, H * D]
        """
        t, heads, d = q.shape
        kv_heads = k.shape[1]
        g = heads // kv_heads
        k_cache, v_cache = self.k[layer], self.v[layer]
        k_cache.view(-1, kv_heads, d).index_copy_(0, batch.write_slots, k)
        v_cache.view(-1, kv_heads, d).index_copy_(0, batch.write_slots, v)
        out = torch.empty(t, heads * d, dtype=q.dtype, device=q.device)
        for bucket in batch.buckets:
            b, n, _ = bucket.shape
            keys = k_cache.index_select(0, bucket.blocks).view(b, -1, kv_heads, d).transpose(1, 2)
            values = v_cache.index_select(0, bucket.blocks).view(b, -1, kv_heads, d).transpose(1, 2)
            # The G query heads of a KV head become queries of it: [B, KVH, G * Q, D].
            queries = (
                q.index_select(0, bucket.rows)
                .view(b, n, kv_heads, g, d)
                .permute(0, 2, 3, 1, 4)
                .reshape(b, kv_heads, g * n, d)
            )
            o = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bucket.mask)
            o = o.view(b, kv_heads, g, n, d).permute(0, 3, 1, 2, 4).reshape(b * n, heads * d)
            if bucket.out_index is not None:
                o = o.index_select(0, bucket.out_index)
            out.index_copy_(0, bucket.out_rows, o)
        return out
