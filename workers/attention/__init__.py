"""Attention over the paged KV cache: prefill chunks and decode in one batch.

One form serves all families: grouped queries; a window of the last tokens; a learned sink per
head, which takes its share of the softmax and gives nothing; and a cache whose values are the first
columns of its keys, which is multi-head latent attention over its compressed cache.
"""

from .batch import AttentionBatch, plan_attention
from .cache import PagedKVCache
from .padded import PaddedBatch
from .paged import DecodeBuffers, PagedBatch

__all__ = [
    "AttentionBatch",
    "DecodeBuffers",
    "PaddedBatch",
    "PagedBatch",
    "PagedKVCache",
    "plan_attention",
]
