"""Wrong input ends in a ValueError that names the argument and says what would be right."""

import dataclasses

import pytest
import torch
from loraplex.kernels import (
    DenseSegments,
    LoraBatch,
    fused_moe,
    lora_linear_,
    moe_lora_align_block_size,
    torch_backend,
)

from .cases import random_layer
from .factors import random_dense_tables


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda x: x[:-1], r"x must have shape \[20, any\], got \[19, 40\]"),
        ("x", lambda x: x.long(), "x must be torch.float32 or .*, got torch.int64"),
        ("w13", lambda w: w[:, :, :-1], r"w13 must have shape \[any, any, 40\]"),
        ("w13", lambda w: w[:, :-1], r"w13 must have gate and up rows"),
        ("w13", lambda w: w.half(), "w13 must be torch.float32, got torch.float16"),
        ("w2", lambda w: w[:-1], r"w2 must have shape \[6, 40, any\]"),
        ("w2", lambda w: w[:, :-1], r"w2 must have shape \[6, 40, any\]"),
        ("w2", lambda w: w[:, :, :-1], r"w2 must have shape \[6, any, 24\]"),
        ("topk_weights", lambda w: w[:, :1], r"topk_weights must have shape \[20, 2\]"),
        ("topk_ids", lambda i: i.float(), "topk_ids must be torch.int32 or torch.int64"),
        ("topk_ids", lambda i: i + 5, "topk_ids must be below num_experts = 6"),
        ("token_slot", lambda s: s[:-1], r"token_slot must have shape \[20\], got \[19\]"),
        ("token_slot", lambda s: s + 4, "token_slot must be below the tables' 4 slots"),
        ("token_slot", lambda s: s.float(), "token_slot must be torch.int32 or torch.int64"),
    ],
)
def test_fused_moe(name, change, message):
    layer = random_layer(1, 20)
    layer = dataclasses.replace(layer, **{name: change(getattr(layer, name))})
    with pytest.raises(ValueError, match=message):
        fused_moe(*layer.args(), layer.tables, layer.token_slot)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pool", lambda p: p.view(1, -1), r"tables.pool must have shape \[any\]"),
        ("pool", lambda p: p[:500], r"tables name elements up to \d+ of a pool that has 500"),
        ("offset_a13", lambda o: o[:, 1:], r"tables.offset_a13 must have shape \[any, 6\]"),
        ("rank", lambda r: r[..., 0], r"tables.rank must have shape \[any, 6, 3\]"),
        ("scale", lambda s: s[0], r"tables.scale must have shape \[any, 6, 3\]"),
    ],
)
def test_expert_tables(name, change, message):
    layer = random_layer(1, 20)
    tables = dataclasses.replace(layer.tables, **{name: change(getattr(layer.tables, name))})
    with pytest.raises(ValueError, match=message):
        fused_moe(*layer.args(), tables, layer.token_slot)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(7, 16)}, r"x must have shape \[6, any\]"),
        ({"out": torch.zeros(6, 11)}, r"out must have shape \[6, 12\]"),
        ({"out": torch.zeros(6, 12).half()}, "out must be torch.float32"),
        ({"token_slot": torch.full((6,), 2)}, "token_slot must be below the tables' 2 slots"),
    ],
)
def test_lora_linear(changes, message):
    given = {"out": torch.zeros(6, 12), "x": torch.zeros(6, 16), "token_slot": torch.zeros(6).int()}
    given |= changes
    tables = random_dense_tables(1, 2, 16, (8, 4), ranks=(4,))
    segments = DenseSegments.from_token_slot(given["token_slot"])
    with pytest.raises(ValueError, match=message):
        lora_linear_(given["out"], given["x"], tables, segments)


def test_batches_of_padded_blocks_are_not_for_the_torch_stages():
    layer = random_layer(1, 20)
    batch = moe_lora_align_block_size(layer.topk_ids, None, 16, 6)
    with pytest.raises(ValueError, match=r"block_size 1.*got block_size 16"):
        torch_backend.gate_up(layer.x, layer.w13, batch)


def test_block_size_and_token_slot_of_align():
    ids = torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        moe_lora_align_block_size(ids, None, 0, 4)
    with pytest.raises(ValueError, match=r"token_slot must have shape \[3\]"):
        moe_lora_align_block_size(ids, torch.zeros(2, dtype=torch.int32), 1, 4)


def test_a_batch_of_another_length_is_refused():
    layer = random_layer(1, 20)
    batch = LoraBatch.from_token_slot(layer.token_slot[:-1])
    with pytest.raises(ValueError, match=r"token_slot must have shape \[20\]"):
        fused_moe(*layer.args(), layer.tables, batch)
