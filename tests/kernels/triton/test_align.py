"""The align kernels: what `align_reference` says, in one launch and in chunks."""

import importlib
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loraplex.kernels import LoraBatch, moe_lora_align_block_size
from loraplex.kernels.gpu import align

from ..cases import assert_aligned, listed_segments
from ..factors import random_routing
from ..poison import poisoned_memory
from .layers import batch_of, examples, interpreted

pytestmark = interpreted

# The function of that name hides the module from a plain import.
module = importlib.import_module("loraplex.kernels.gpu.align")

WAYS = ("one launch", "chunks")
BLOCK_SIZES = st.sampled_from([1, 2, 16, 32, 64])


@contextmanager
def aligning_by(way: str):
    pairs = 1 << 30 if way == "one launch" else 0
    with (
        mock.patch.object(module, "ONE_LAUNCH_PAIRS", pairs),
        mock.patch.object(module, "CHUNK_PAIRS", 64),
        poisoned_memory(),
    ):
        yield


@st.composite
def batches(draw):
    """topk_ids and token slots."""
    seed = draw(st.integers(0, 2**31))
    num_experts = draw(st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 40])))
    tokens, top_k = draw(st.integers(1, 50)), draw(st.integers(1, min(4, num_experts)))
    _, ids = random_routing(
        seed, tokens, num_experts, top_k, skipped=draw(st.sampled_from([0.0, 0.3, 1.0]))
    )
    if draw(st.booleans(), label="all on one expert"):
        ids = torch.where(ids >= 0, num_experts - 1, ids)
    slots = draw(st.sampled_from([None, 0, 1, 3, 300]))  # 0: nobody has an adapter
    token_slot = None
    if slots is not None:
        generator = torch.Generator().manual_seed(seed)
        token_slot = torch.randint(-1, max(slots, 1), (tokens,), generator=generator)
        token_slot = token_slot.clamp(max=slots - 1).int()
        if draw(st.booleans(), label="ordered"):
            token_slot = token_slot.sort().values
    return ids.to(draw(st.sampled_from([torch.int32, torch.int64]))), token_slot, num_experts


@pytest.mark.parametrize("way", WAYS)
@examples(60)
@given(batch=batches(), block_size=BLOCK_SIZES)
def test_any_batch_is_as_the_reference_says(way, batch, block_size):
    ids, token_slot, num_experts = batch
    lora_batch = None if token_slot is None else batch_of(token_slot)
    with aligning_by(way):
        aligned = align(ids, lora_batch, block_size, num_experts)
    assert_aligned(aligned, ids, token_slot, block_size, num_experts)


@pytest.mark.parametrize("way", WAYS)
@examples(25)
@given(batch=batches(), block_size=BLOCK_SIZES)
def test_rows_are_complete_homogeneous_and_ordered(way, batch, block_size):
    """The promises themselves, not by way of the reference."""
    ids, token_slot, num_experts = batch
    tokens, top_k = ids.shape
    with aligning_by(way):
        lora_batch = None if token_slot is None else batch_of(token_slot)
        aligned = align(ids, lora_batch, block_size, num_experts)
    flat = ids.reshape(-1).tolist()
    slots = [-1] * tokens if token_slot is None else token_slot.tolist()
    blocks = int(aligned.num_blocks)
    rows = aligned.sorted_pairs.tolist()[: blocks * block_size]
    real = []
    for block in range(blocks):
        end, expert = int(aligned.block_end[block]), int(aligned.block_expert[block])
        first = block * block_size
        assert first < end <= first + block_size
        assert {flat[pair] for pair in rows[first:end]} == {expert}
        assert set(rows[end : first + block_size]) <= {tokens * top_k}
        real += rows[first:end]
    assert sorted(real) == [pair for pair, expert in enumerate(flat) if expert >= 0]
    keys = [(flat[pair], slots[pair // top_k], pair) for pair in real]
    assert keys == sorted(keys)
    assert blocks == sum(-(-flat.count(expert) // block_size) for expert in range(num_experts))
    if token_slot is not None:
        in_runs = {}
        for block, slot, first, end in listed_segments(aligned):
            assert block * block_size <= first < end <= int(aligned.block_end[block])
            in_runs |= dict.fromkeys(range(first, end), slot)
        adapted = {
            row: slots[pair // top_k]
            for row, pair in enumerate(rows)
            if pair != tokens * top_k and slots[pair // top_k] >= 0
        }
        assert in_runs == adapted


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("block_size", [1, 16])
def test_equal_to_the_torch_implementation(way, block_size):
    _, ids = random_routing(1, 60, 12, 3, skipped=0.2)
    token_slot = torch.randint(-1, 5, (60,), generator=torch.Generator().manual_seed(1)).int()
    ours = moe_lora_align_block_size(ids, token_slot, block_size, 12)
    with aligning_by(way):
        theirs = align(ids, batch_of(token_slot), block_size, 12)
    blocks = int(ours.num_blocks)
    assert int(theirs.num_blocks) == blocks
    for name, count in (
        ("sorted_pairs", blocks * block_size),
        ("block_expert", blocks),
        ("block_end", blocks),
    ):
        assert torch.equal(getattr(ours, name)[:count], getattr(theirs, name)[:count])
    assert listed_segments(ours) == listed_segments(theirs)


def test_more_chunks_than_one_scan_step_takes():
    _, ids = random_routing(2, 2100, 5, 4, skipped=0.1)
    token_slot = torch.randint(-1, 9, (2100,), generator=torch.Generator().manual_seed(2)).int()
    with aligning_by("chunks"):
        aligned = align(ids, batch_of(token_slot), 64, 5)
    assert ids.numel() > 128 * 64
    assert_aligned(aligned, ids, token_slot, 64, 5)


def test_more_pairs_than_one_step_of_the_one_launch_takes():
    _, ids = random_routing(3, 700, 4, 2, skipped=0.1)
    token_slot = torch.randint(-1, 9, (700,), generator=torch.Generator().manual_seed(3)).int()
    with aligning_by("one launch"):
        aligned = align(ids, batch_of(token_slot), 64, 4)
    assert ids.numel() > 1024
    assert_aligned(aligned, ids, token_slot, 64, 4)


def test_slots_of_other_lengths_of_integer():
    """Slots are read as they come: an engine may keep them in 64 bits."""
    _, ids = random_routing(4, 20, 4, 2)
    token_slot = torch.arange(20) % 3 - 1
    with aligning_by("one launch"):
        lora_batch = LoraBatch(token_slot, token_slot.argsort(stable=True))
        aligned = align(ids, lora_batch, 16, 4)
    assert_aligned(aligned, ids, token_slot, 16, 4)


@pytest.mark.parametrize("way", WAYS)
def test_ids_may_be_strided(way):
    _, ids = random_routing(5, 30, 6, 2)
    wide = torch.cat((ids, torch.full_like(ids, 99)), 1)[:, :2]
    with aligning_by(way):
        aligned = align(wide, None, 16, 6)
    assert_aligned(aligned, ids, None, 16, 6)


def test_no_tokens():
    with aligning_by("one launch"):
        aligned = align(torch.zeros(0, 2, dtype=torch.int32), None, 16, 6)
    assert aligned.num_blocks.tolist() == [0]


@pytest.mark.parametrize("way", WAYS)
def test_ids_beyond_the_experts_are_left_out(way):
    """They can't be refused without a wait for the GPU; no memory may be touched by them."""
    ids = torch.tensor([[0, 7], [3, 1], [2, -5], [4, 0]], dtype=torch.int32)
    with aligning_by(way):
        aligned = align(ids, None, 2, 3)
    assert_aligned(aligned, ids.where((ids >= 0) & (ids < 3), -1), None, 2, 3)
