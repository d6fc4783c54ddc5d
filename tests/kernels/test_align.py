import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.kernels import (
    LoraBatch,
    MoeWeights,
    TorchBackend,
    align_reference,
    moe_lora_align_block_size,
)

from .cases import assert_aligned, listed_segments
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
BLOCK_SIZES = st.sampled_from([1, 2, 16, 64])


def batch_of(seed, tokens, num_experts, top_k, slots, skipped, ordered):
    _, ids = random_routing(seed, tokens, num_experts, min(top_k, num_experts), skipped=skipped)
    generator = torch.Generator().manual_seed(seed)
    token_slot = torch.randint(-1, slots, (tokens,), generator=generator).int() if slots else None
    if token_slot is not None and ordered:
        token_slot = token_slot.sort().values
    return ids, token_slot


def experts_of(count: int) -> MoeWeights:
    return MoeWeights(torch.empty(count, 2, 1), torch.empty(count, 1, 1))


@settings(max_examples=150)
@given(**BATCHES, block_size=BLOCK_SIZES)
def test_any_batch_is_as_the_reference_says(block_size, **batch):
    ids, token_slot = batch_of(**batch)
    experts = batch["num_experts"]
    aligned = moe_lora_align_block_size(ids, token_slot, block_size, experts)
    assert_aligned(aligned, ids, token_slot, block_size, experts)


@settings(max_examples=150)
@given(**BATCHES)
def test_the_torch_backends_rows_are_the_blocks_of_one_row(**batch):
    ids, token_slot = batch_of(**batch)
    experts = batch["num_experts"]
    lora_batch = None if token_slot is None else LoraBatch.from_token_slot(token_slot)
    rows = TorchBackend().align(ids, lora_batch, experts_of(experts))
    pairs, row_expert, row_segments = align_reference(ids, token_slot, 1, experts)
    assert rows.sorted_pairs.tolist() == pairs
    assert rows.row_token.tolist() == [pair // ids.shape[1] for pair in pairs]
    assert rows.expert_first_row.tolist() == [
        sum(expert < bound for expert in row_expert) for bound in range(experts + 1)
    ]
    # Rows that follow each other with one expert and slot are one segment.
    segments: list[list[int]] = []
    for row, slot, _, _ in row_segments:
        if segments and segments[-1][:2] == [slot, row_expert[row]] and segments[-1][3] == row:
            segments[-1][3] = row + 1
        else:
            segments.append([slot, row_expert[row], row, row + 1])
    assert rows.segments.tolist() == segments


@settings(max_examples=80)
@given(**BATCHES, block_size=st.sampled_from([1, 4, 16]))
def test_rows_are_complete_ordered_and_padded_by_expert(block_size, **batch):
    """The promises of the order themselves, not by way of the reference."""
    ids, token_slot = batch_of(**batch)
    experts, (tokens, top_k) = batch["num_experts"], ids.shape
    aligned = moe_lora_align_block_size(ids, token_slot, block_size, experts)
    flat, slots = ids.reshape(-1).tolist(), [-1] * tokens
    if token_slot is not None:
        slots = token_slot.tolist()
    blocks = int(aligned.num_blocks)
    rows = aligned.sorted_pairs[: blocks * block_size].tolist()
    real = [pair for pair in rows if pair != tokens * top_k]
    assert sorted(real) == [pair for pair in range(tokens * top_k) if flat[pair] >= 0]
    keys = [(flat[pair], slots[pair // top_k], pair) for pair in real]
    assert keys == sorted(keys)
    for row, pair in enumerate(rows):
        if pair == tokens * top_k:
            assert row >= aligned.block_end[row // block_size]
        else:
            assert row < aligned.block_end[row // block_size]
            assert flat[pair] == aligned.block_expert[row // block_size]
    used = [-(-flat.count(expert) // block_size) for expert in range(experts)]
    assert blocks == sum(used)
    assert aligned.block_expert[:blocks].bincount(minlength=experts).tolist() == used
    if token_slot is None:
        assert aligned.segments is None
        return
    covered = set()
    for block, slot, first, end in listed_segments(aligned):
        assert block * block_size <= first < end <= (block + 1) * block_size
        for row in range(first, end):
            assert row not in covered
            covered.add(row)
            assert slots[rows[row] // top_k] == slot >= 0
    assert len(covered) == sum(slots[pair // top_k] >= 0 for pair in real)
    runs = [(block, slot) for block, slot, _, _ in listed_segments(aligned)]
    assert len(runs) == len(set(runs)), "one slot has two runs in a block"


def test_all_tokens_on_one_expert_make_one_run_of_blocks():
    ids = torch.full((10, 1), 3, dtype=torch.int32)
    aligned = moe_lora_align_block_size(ids, torch.arange(10).int() % 2, 4, 8)
    assert aligned.num_blocks.tolist() == [3]
    assert aligned.block_expert[:3].tolist() == [3, 3, 3]
    assert aligned.block_end[:3].tolist() == [4, 8, 10]
    assert aligned.sorted_pairs[:12].tolist() == [0, 2, 4, 6, 8, 1, 3, 5, 7, 9, 10, 10]
    assert listed_segments(aligned) == [(0, 0, 0, 4), (1, 0, 4, 5), (1, 1, 5, 8), (2, 1, 8, 10)]


def test_ids_of_either_integer_type_are_taken():
    _, ids = random_routing(5, 9, 4, 2)
    for ids_given in (ids, ids.long()):
        aligned = moe_lora_align_block_size(ids_given, None, 4, 4)
        assert_aligned(aligned, ids, None, 4, 4)


def test_slots_may_come_as_a_batch_made_once():
    _, ids = random_routing(6, 9, 4, 2)
    token_slot = torch.tensor([2, -1, 0, 2, 1, 0, -1, -1, 2], dtype=torch.int32)
    lora_batch = LoraBatch.from_token_slot(token_slot)
    assert_aligned(moe_lora_align_block_size(ids, lora_batch, 4, 4), ids, token_slot, 4, 4)


@pytest.mark.parametrize("align", [
    lambda ids: moe_lora_align_block_size(ids, None, 1, 4),
    lambda ids: TorchBackend().align(ids, None, experts_of(4)),
])  # fmt: skip
def test_an_id_beyond_the_experts_is_refused(align):
    with pytest.raises(ValueError, match="topk_ids must be below num_experts = 4, got 9"):
        align(torch.tensor([[1, 9]], dtype=torch.int32))
