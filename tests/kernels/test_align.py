import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.kernels import LoraBatch, moe_lora_align_block_size, torch_backend

from .cases import assert_aligned
from .factors import random_routing

BATCHES = {
    "seed": st.integers(0, 2**31),
    "tokens": st.integers(0, 70),
    "num_experts": st.integers(1, 40),
    "top_k": st.integers(1, 6),
    "slots": st.integers(0, 300),
    "skipped": st.sampled_from([0.0, 0.3, 1.0]),
    "ordered": st.booleans(),
}


def batch_of(seed, tokens, num_experts, top_k, slots, skipped, ordered):
    _, ids = random_routing(seed, tokens, num_experts, min(top_k, num_experts), skipped=skipped)
    generator = torch.Generator().manual_seed(seed)
    token_slot = torch.randint(-1, slots, (tokens,), generator=generator).int() if slots else None
    if token_slot is not None and ordered:
        token_slot = token_slot.sort().values
    return ids, token_slot


@settings(max_examples=150, deadline=None)
@given(**BATCHES, block_size=st.sampled_from([1, 2, 7, 16, 64]))
def test_any_block_size_is_as_the_reference_says(block_size, **batch):
    ids, token_slot = batch_of(**batch)
    experts = batch["num_experts"]
    aligned = moe_lora_align_block_size(ids, token_slot, block_size, experts)
    assert_aligned(aligned, ids, token_slot, block_size, experts)


@settings(max_examples=150, deadline=None)
@given(**BATCHES)
def test_the_backends_rows_are_the_blocks_of_one_row(**batch):
    ids, token_slot = batch_of(**batch)
    lora_batch = None if token_slot is None else LoraBatch.from_token_slot(token_slot)
    aligned = torch_backend.align(ids, lora_batch, batch["num_experts"])
    assert_aligned(aligned, ids, token_slot, 1, batch["num_experts"])


@settings(max_examples=80, deadline=None)
@given(**BATCHES, block_size=st.sampled_from([1, 4, 16]))
def test_rows_are_complete_ordered_and_padded_by_expert(block_size, **batch):
    """The promises of the order themselves, not by way of the reference."""
    ids, token_slot = batch_of(**batch)
    experts, (tokens, top_k) = batch["num_experts"], ids.shape
    aligned = moe_lora_align_block_size(ids, token_slot, block_size, experts)
    flat, slots = ids.reshape(-1).tolist(), [-1] * tokens
    if token_slot is not None:
        slots = token_slot.tolist()
    rows = aligned.sorted_pairs.tolist()
    real = [pair for pair in rows if pair != tokens * top_k]
    assert sorted(real) == [pair for pair in range(tokens * top_k) if flat[pair] >= 0]
    keys = [(flat[pair], slots[pair // top_k], pair) for pair in real]
    assert keys == sorted(keys)
    assert len(rows) % block_size == 0
    for row, pair in enumerate(rows):
        if pair != tokens * top_k:
            assert flat[pair] == aligned.block_expert[row // block_size]
    bounds = aligned.expert_first_row.tolist()
    for expert in range(experts):
        used = flat.count(expert)
        assert bounds[expert + 1] - bounds[expert] == -(-used // block_size) * block_size
    covered = set()
    for slot, expert, first, end in aligned.segments.tolist():
        assert first < end
        for row in range(first, end):
            assert row not in covered
            covered.add(row)
            assert slots[rows[row] // top_k] == slot >= 0
            assert flat[rows[row]] == expert
    adapted = sum(slots[pair // top_k] >= 0 for pair in real)
    assert len(covered) == adapted


def test_all_tokens_on_one_expert_make_one_run_of_blocks():
    ids = torch.full((10, 1), 3, dtype=torch.int32)
    aligned = moe_lora_align_block_size(ids, torch.arange(10).int() % 2, 4, 8)
    assert aligned.block_expert.tolist() == [3, 3, 3]
    assert aligned.segments.tolist() == [[0, 3, 0, 5], [1, 3, 5, 10]]
    assert aligned.row_token.tolist() == [0, 2, 4, 6, 8, 1, 3, 5, 7, 9, 10, 10]


def test_ids_of_either_integer_type_are_taken():
    _, ids = random_routing(5, 9, 4, 2)
    for ids_given in (ids, ids.long()):
        aligned = moe_lora_align_block_size(ids_given, None, 4, 4)
        assert_aligned(aligned, ids, None, 4, 4)


@pytest.mark.parametrize("align", [
    lambda ids: moe_lora_align_block_size(ids, None, 1, 4),
    lambda ids: torch_backend.align(ids, None, 4),
])  # fmt: skip
def test_an_id_beyond_the_experts_is_refused(align):
    with pytest.raises(ValueError, match="topk_ids must be below num_experts = 4, got 9"):
        align(torch.tensor([[1, 9]], dtype=torch.int32))
