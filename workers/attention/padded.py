"""Attention over the paged KV cache in plain torch, for CPUs: prefill chunks and decode in one
batch.

Sequences of similar shape (new tokens, context blocks; both rounded up to powers of two) are
padded together and go through one scaled_dot_product_attention each.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..step import SequenceStep
from .buckets import pow2


@dataclass
class _Bucket:
    """B sequences of up to Q new tokens over up to N blocks (S = N * block_size keys)."""

    rows: torch.Tensor  # int64 [B * Q], row of the batch; padding repeats the last row
    out_index: torch.Tensor | None  # int64 [valid], rows of [B * Q] that aren't padding; None: all
    out_rows: torch.Tensor  # int64 [valid], rows of the batch they belong to
    blocks: torch.Tensor  # int64 [B * N]
    query_positions: torch.Tensor  # int64 [B, Q]
    shape: tuple[int, int, int]  # B, Q, N
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)  # by window

    def unwritten(self, keys: int) -> torch.Tensor:
        """bool [B, 1, S, 1], True where a key isn't the sequence's own."""
        last = self.query_positions[:, -1]  # padding repeats the last one
        key = torch.arange(keys, device=last.device)
        return (key > last[:, None])[:, None, :, None]

    def mask(self, window: int | None, group_heads: int, keys: int) -> torch.Tensor:
        """bool [B, 1, G * Q, S], True where a query may look."""
        if window not in self.masks:
            b, q, _ = self.shape
            query = self.query_positions[:, :, None]
            key = torch.arange(keys, device=query.device)
            mask = key <= query
            if window is not None:
                mask &= key > query - window
            mask = mask[:, None, None].expand(b, 1, group_heads, q, keys)
            self.masks[window] = mask.reshape(b, 1, group_heads * q, keys)
        return self.masks[window]


@dataclass
class PaddedBatch:
    """An `AttentionBatch` in buckets."""

    write_slots: torch.Tensor  # int64 [T], block * block_size + offset of each new token
    buckets: list[_Bucket]

    @classmethod
    def plan(
        cls, sequences: list[SequenceStep], block_size: int, device: torch.device
    ) -> PaddedBatch:
        """Lays out one step's attention."""
        write: list[torch.Tensor] = []
        by_shape: dict[tuple[int, int], list[tuple[int, SequenceStep]]] = defaultdict(list)
        row = 0
        for seq in sequences:
            n, start = len(seq.token_ids), seq.start
            pos = torch.arange(start, start + n)
            table = torch.tensor(seq.blocks)
            write.append(table[pos // block_size] * block_size + pos % block_size)
            used_blocks = -(-(start + n) // block_size)
            by_shape[pow2(n), pow2(used_blocks)].append((row, seq))
            row += n
        buckets = [_bucket(members, q, nb, device) for (q, nb), members in by_shape.items()]
        return cls(torch.cat(write).to(device), buckets)

    def write(
        self, k: torch.Tensor, v: torch.Tensor | None, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> None:
        kv_heads, d = k_cache.shape[2:]
        k_cache.view(-1, kv_heads, d).index_copy_(0, self.write_slots, k)
        if v is not None:
            v_cache.view(-1, kv_heads, v_cache.shape[3]).index_copy_(0, self.write_slots, v)

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
        t, heads, d = q.shape
        kv_heads, dv = v_cache.shape[2:]
        g = heads // kv_heads
        out = torch.empty(t, heads * dv, dtype=q.dtype, device=q.device)
        for bucket in self.buckets:
            b, n, _ = bucket.shape
            keys = k_cache.index_select(0, bucket.blocks).view(b, -1, kv_heads, d).transpose(1, 2)
            if latent:
                values = keys[..., :dv]
            else:
                values = v_cache.index_select(0, bucket.blocks)
                values = values.view(b, -1, kv_heads, dv).transpose(1, 2)
            # The G query heads of a KV head become queries of it: [B, KVH, G * Q, D].
            queries = (
                q.index_select(0, bucket.rows)
                .view(b, n, kv_heads, g, d)
                .permute(0, 2, 3, 1, 4)
                .reshape(b, kv_heads, g * n, d)
            )
            # Of an earlier holder of the block, maybe not finite: a weight of zero won't hide that.
            unwritten = bucket.unwritten(keys.shape[2])
            keys.masked_fill_(unwritten, 0)
            if not latent:
                values.masked_fill_(unwritten, 0)
            mask = bucket.mask(window, g, keys.shape[2])
            if sinks is not None:
                keys, values, mask = _with_sinks(keys, values, mask, sinks, n)
            o = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
            o = o.view(b, kv_heads, g, n, dv).permute(0, 3, 1, 2, 4).reshape(b * n, heads * dv)
            if bucket.out_index is not None:
                o = o.index_select(0, bucket.out_index)
            out.index_copy_(0, bucket.out_rows, o)
        return out


def _bucket(
    members: list[tuple[int, SequenceStep]],
    q: int,
    nb: int,
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
    valid = (i < n).reshape(-1)
    whole = bool(valid.all())
    flat = rows.reshape(-1)
    return _Bucket(
        rows=flat.to(device),
        out_index=None if whole else valid.nonzero()[:, 0].to(device),
        out_rows=(flat if whole else flat[valid]).to(device),
        blocks=torch.tensor(padded).reshape(-1).to(device),
        query_positions=q_pos.to(device),
        shape=(b, q, nb),
    )


def _with_sinks(
    keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, sinks: torch.Tensor, n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A key of zeros in front, whose logit is its head's sink and whose value is zero.

    keys and values [B, KVH, S, D], mask bool [B, 1, G * Q, S], sinks [KVH * G]; n is Q.
    """
    b, kv_heads, length, _ = keys.shape
    of_query = sinks.view(kv_heads, -1).repeat_interleave(n, dim=1)  # [KVH, G * Q]
    bias = torch.zeros(mask.shape, dtype=keys.dtype, device=keys.device)
    bias = bias.masked_fill(~mask, float("-inf")).expand(b, kv_heads, -1, length)
    sink_bias = of_query.to(keys.dtype)[None, :, :, None].expand(b, -1, -1, 1)
    return F.pad(keys, (0, 0, 1, 0)), F.pad(values, (0, 0, 1, 0)), torch.cat([sink_bias, bias], -1)
