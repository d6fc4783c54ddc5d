"""Changes to the arguments of a layer (20 tokens, 6 experts top 2, 40 and 24 wide, 4 slots) that
every device must refuse, and what the refusal must say."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from loraplex.kernels import DenseLoraTables

from .cases import Layer

LAYER = [
    ("x", lambda x: x[0], r"x must have shape \[any, any\], got \[40\]"),
    ("x", lambda x: x[:-1], r"topk_ids must have shape \[19, any\], got \[20, 2\]"),
    ("x", lambda x: x.long(), "x must be torch.float32 or .*, got torch.int64"),
    ("w13", lambda w: w[:, :, :-1], r"w13 must have shape \[any, any, 40\]"),
    ("w13", lambda w: w[:, :-1], r"w13 must have gate and up rows"),
    ("w13", lambda w: w.half(), "w13 must be torch.float32, got torch.float16"),
    ("w13", lambda w: w.to("meta"), "w13 must be on .*, got meta"),
    ("w2", lambda w: w[:-1], r"w2 must have shape \[6, 40, 24\], got \[5, 40, 24\]"),
    ("w2", lambda w: w[:, :-1], r"w2 must have shape \[6, 40, 24\], got \[6, 39, 24\]"),
    ("w2", lambda w: w[:, :, :-1], r"w2 must have shape \[6, 40, 24\], got \[6, 40, 23\]"),
    ("w13_bias", lambda b: b[:, 1:], r"w13_bias must have shape \[6, 48\], got \[6, 47\]"),
    ("w2_bias", lambda b: b[1:], r"w2_bias must have shape \[6, 40\], got \[5, 40\]"),
    ("topk_weights", lambda w: w[:, :1], r"topk_weights must have shape \[20, 2\]"),
    ("topk_weights", lambda w: w.to("meta"), "topk_weights must be on .*, got meta"),
    ("topk_ids", lambda i: i.float(), "topk_ids must be torch.int32 or torch.int64"),
    ("topk_ids", lambda i: i.reshape(-1), r"topk_ids must have shape \[20, any\], got \[40\]"),
    ("topk_ids", lambda i: i.to("meta"), "topk_ids must be on .*, got meta"),
    ("token_slot", lambda s: s[:-1], r"token_slot must have shape \[20\], got \[19\]"),
    ("token_slot", lambda s: s.float(), "token_slot must be torch.int32 or torch.int64"),
]

TABLES = [
    ("pool", lambda p: p.view(1, -1), r"tables.pool must have shape \[any\]"),
    ("pool", lambda p: p.double(), "tables.pool must be torch.float32 or .*, got torch.float64"),
    ("pool", lambda p: p.to("meta"), "tables.pool must be on .*, got meta"),
    ("offset_a13", lambda o: o[:, 1:], r"tables.offset_a13 must have shape \[4, 6\], got \[4, 5\]"),
    ("offset_b13", lambda o: o[1:], r"tables.offset_b13 must have shape \[4, 6\], got \[3, 6\]"),
    ("offset_a2", lambda o: o[0], r"tables.offset_a2 must have shape \[4, 6\], got \[6\]"),
    ("offset_b2", lambda o: o[:, 1:], r"tables.offset_b2 must have shape \[4, 6\], got \[4, 5\]"),
    ("rank", lambda r: r[..., 0], r"tables.rank must have shape \[4, 6, 3\], got \[4, 6\]"),
    ("scale", lambda s: s[0], r"tables.scale must have shape \[4, 6, 3\], got \[6, 3\]"),
    ("max_rank", lambda _: 257, "tables.max_rank must be from 1 to 256, got 257"),
    ("max_rank", lambda _: 0, "tables.max_rank must be from 1 to 256, got 0"),
]

# Of lora_linear_ with 6 tokens of 16, outputs of 8 and 4, 2 slots.
DENSE = [
    ("x", lambda x: torch.cat((x, x)), r"x must have shape \[6, any\], got \[12, 16\]"),
    ("out", lambda out: out[:, 1:], r"out must have shape \[6, 12\], got \[6, 11\]"),
    ("out", lambda out: out.half(), "out must be torch.float32, got torch.float16"),
    ("out", lambda out: out.to("meta"), "out must be on .*, got meta"),
]
DENSE_TABLES = [
    ("pool", lambda p: p.view(1, -1), r"tables.pool must have shape \[any\]"),
    ("pool", lambda p: p.to("meta"), "tables.pool must be on .*, got meta"),
    ("rank", lambda r: r[:, :1], r"tables.rank must have a column for each of the 2 out_sizes"),
    ("max_rank", lambda _: 257, "tables.max_rank must be from 1 to 256, got 257"),
]


def ids(cases: list[tuple]) -> list[str]:
    return [f"{name}-{nth}" for nth, (name, *_) in enumerate(cases)]


def changed_layer(layer: Layer, name: str, change: Any) -> Layer:
    return dataclasses.replace(layer, **{name: change(getattr(layer, name))})


def changed_tables(layer: Layer, name: str, change: Any) -> Layer:
    tables = dataclasses.replace(layer.tables, **{name: change(getattr(layer.tables, name))})
    return dataclasses.replace(layer, tables=tables)


def changed_dense_tables(tables: DenseLoraTables, name: str, change: Any) -> DenseLoraTables:
    return dataclasses.replace(tables, **{name: change(getattr(tables, name))})
