"""Wrong input ends in a ValueError that names the argument and says what would be right."""

import pytest
import torch
from loraplex.kernels import LoraBatch, fused_moe, lora_linear_, moe_lora_align_block_size

from . import wrong_input
from .cases import Layer, random_layer
from .factors import random_dense_tables


def run(layer: Layer) -> torch.Tensor:
    return fused_moe(*layer.args(), layer.tables, layer.token_slot, **layer.options())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        *wrong_input.LAYER,
        # On CPU also what is in the tensors.
        ("topk_ids", lambda i: i + 5, "topk_ids must be below num_experts = 6"),
        ("token_slot", lambda s: s + 4, "token_slot must be below the tables' 4 slots"),
    ],
    ids=[*wrong_input.ids(wrong_input.LAYER), "ids-beyond-experts", "slots-beyond-tables"],
)
def test_fused_moe(name, change, message):
    layer = random_layer(1, 20, gpt_oss=True)
    run(layer)
    with pytest.raises(ValueError, match=message):
        run(wrong_input.changed_layer(layer, name, change))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        *wrong_input.TABLES,
        ("pool", lambda p: p[:500], r"tables name elements up to \d+ of a pool that has 500"),
    ],
    ids=[*wrong_input.ids(wrong_input.TABLES), "pool-too-small"],
)
def test_expert_tables(name, change, message):
    layer = random_layer(1, 20)
    run(layer)
    with pytest.raises(ValueError, match=message):
        run(wrong_input.changed_tables(layer, name, change))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        *wrong_input.DENSE,
        ("token_slot", lambda s: s + 2, "token_slot must be below the tables' 2 slots"),
    ],
    ids=[*wrong_input.ids(wrong_input.DENSE), "slots-beyond-tables"],
)
def test_lora_linear(name, change, message):
    given = {"out": torch.zeros(6, 12), "x": torch.zeros(6, 16), "token_slot": torch.zeros(6).int()}
    given[name] = change(given[name])
    tables = random_dense_tables(1, 2, 16, (8, 4), ranks=(4,))
    with pytest.raises(ValueError, match=message):
        lora_linear_(given["out"], given["x"], tables, LoraBatch(given["token_slot"], None))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    wrong_input.DENSE_TABLES,
    ids=wrong_input.ids(wrong_input.DENSE_TABLES),
)
def test_dense_tables(name, change, message):
    tables = random_dense_tables(1, 2, 16, (8, 4), ranks=(4,))
    out, x, batch = torch.zeros(6, 12), torch.zeros(6, 16), LoraBatch(torch.zeros(6).int(), None)
    lora_linear_(out, x, tables, batch)
    wrong = wrong_input.changed_dense_tables(tables, name, change)
    with pytest.raises(ValueError, match=message):
        lora_linear_(out, x, wrong, batch)


@pytest.mark.parametrize("block_size", [0, -1, 3, 24])
def test_block_sizes_that_are_no_powers_of_two(block_size):
    ids = torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"block_size must be a power of two, got {block_size}"):
        moe_lora_align_block_size(ids, None, block_size, 4)


def test_token_slots_of_another_length():
    ids = torch.zeros(3, 2, dtype=torch.int32)
    token_slot = torch.zeros(2, dtype=torch.int32)
    for given in (token_slot, LoraBatch.from_token_slot(token_slot)):
        with pytest.raises(ValueError, match=r"token_slot must have shape \[3\]"):
            moe_lora_align_block_size(ids, given, 1, 4)


def test_a_batch_of_another_length_is_refused():
    layer = random_layer(1, 20)
    batch = LoraBatch.from_token_slot(layer.token_slot[:-1])
    with pytest.raises(ValueError, match=r"token_slot must have shape \[20\]"):
        fused_moe(*layer.args(), layer.tables, batch)
