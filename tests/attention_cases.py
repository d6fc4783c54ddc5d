"""Steps over a paged KV cache on fresh random inputs, and slow, plainly right attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from loraplex.workers.attention import PagedKVCache
from loraplex.workers.step import SequenceStep

LAYERS, LAYER = 2, 1  # of the cache, and the one that is written and read
# (tokens before, new tokens) of each sequence
LENGTHS = [(0, 1), (37, 1), (5, 1), (16, 1), (0, 19), (9, 4), (33, 16), (0, 1)]


def attend_slowly(q, keys, values, start, scale, window, sink):
    """Queries [N, D] at positions start, ... over their sequence's keys [S, D], values [S, DV]."""
    query = torch.arange(start, start + len(q), device=q.device)[:, None]
    key = torch.arange(len(keys), device=q.device)[None, :]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    logits = (q.double() @ keys.double().T * scale).masked_fill(~seen, -torch.inf)
    if sink is not None:
        logits = torch.cat([logits, sink.double().expand(len(q), 1)], dim=1)
    return torch.softmax(logits, dim=1)[:, : len(keys)] @ values.double()


def random_sequences(block_size, lengths, blocks):
    """Sequences of (tokens before, new tokens), with their blocks scattered over the cache."""
    free = torch.randperm(blocks).tolist()
    steps = []
    for before, new in lengths:
        need = -(-(before + new) // block_size)
        steps.append(SequenceStep([0] * new, before, [free.pop() for _ in range(need)], -1))
    return steps


@dataclass
class AttentionCase:
    """A step, the cache as earlier steps have left it, and what is to come out."""

    cache: PagedKVCache
    steps: list[SequenceStep]
    q: torch.Tensor  # [T, H, D]
    k: torch.Tensor  # [T, KVH, D]
    v: torch.Tensor | None  # [T, KVH, DV]
    scale: float
    window: int | None
    sinks: torch.Tensor | None
    expected: torch.Tensor  # float64 [T, H * DV]

    def run(self, batch) -> torch.Tensor:
        return self.cache.attend(
            LAYER, self.q, self.k, self.v, batch, self.scale, self.window, self.sinks
        )


def random_case(
    lengths,
    query_heads,
    kv_heads,
    d,
    dv,
    *,
    latent=False,
    window=None,
    sinks=False,
    block_size=8,
    blocks=64,
    unused=0.0,
    dtype=torch.float32,
    device="cpu",
):
    """
    Args:
        unused: what cache memory holds where no token was written.
    """
    device = torch.device(device)
    cache = PagedKVCache(LAYERS, blocks, block_size, kv_heads, d, dtype, device, dv, latent)
    cache.k.fill_(unused)
    cache.v.fill_(unused)
    steps = random_sequences(block_size, lengths, blocks)
    group, scale = query_heads // kv_heads, 0.7 / d**0.5
    sink_logits = torch.randn(query_heads, device=device) * 2 if sinks else None
    new_k, new_v, new_q, expected = [], [], [], []
    for step in steps:
        n = len(step.token_ids)
        length = step.start + n

        def normal(*shape):
            return torch.randn(*shape, device=device).to(dtype)

        q, keys = normal(n, query_heads, d), normal(length, kv_heads, d)
        values = keys[..., :dv] if latent else normal(length, kv_heads, dv)
        block = torch.tensor(step.blocks, device=device)
        before = torch.arange(step.start, device=device)
        cache.k[LAYER, block[before // block_size], before % block_size] = keys[: step.start]
        cache.v[LAYER, block[before // block_size], before % block_size] = values[: step.start]
        heads = [
            attend_slowly(
                q[:, h], keys[:, h // group], values[:, h // group], step.start, scale, window,
                None if sink_logits is None else sink_logits[h],
            )
            for h in range(query_heads)
        ]  # fmt: skip
        expected.append(torch.stack(heads, 1).reshape(n, -1))
        new_q.append(q)
        new_k.append(keys[step.start :])
        new_v.append(values[step.start :])
    return AttentionCase(
        cache, steps, torch.cat(new_q), torch.cat(new_k), None if latent else torch.cat(new_v),
        scale, window, sink_logits, torch.cat(expected),
    )  # fmt: skip
