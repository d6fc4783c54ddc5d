import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.kernels import LoraBatch, lora_linear, lora_linear_, lora_linear_reference

from .cases import PRODUCTS, assert_close, products_by
from .factors import random_dense_tables


def batch_of(token_slot: torch.Tensor) -> LoraBatch:
    return LoraBatch(token_slot, None)


@pytest.mark.parametrize("way", PRODUCTS)
@settings(max_examples=120)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 60),
    in_size=st.integers(1, 70),
    out_sizes=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    slots=st.integers(1, 7),
    ranks=st.sampled_from([(0, 1, 3, 8, 16), (2, 64), (8,), (0,)]),
    a_transposed=st.booleans(),
    ordered=st.booleans(),
)
def test_any_batch_adds_what_the_reference_says(
    way, seed, tokens, in_size, out_sizes, slots, ranks, a_transposed, ordered
):
    out_sizes = tuple(out_sizes)
    tables = random_dense_tables(
        seed, slots, in_size, out_sizes, ranks=ranks, a_transposed=a_transposed
    )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, in_size, generator=generator)
    base = torch.randn(tokens, sum(out_sizes), generator=generator)
    token_slot = torch.randint(-1, slots, (tokens,), generator=generator).int()
    if ordered:
        token_slot = token_slot.sort().values
    out = base.clone()
    with products_by(way):
        lora_linear_(out, x, tables, batch_of(token_slot))
    assert_close(out, base + lora_linear_reference(x, tables, token_slot))


@pytest.mark.parametrize("bias", [False, True])
def test_the_product_and_what_adapters_add_in_one_call(bias):
    tables = random_dense_tables(4, 3, 20, (12, 8))
    x, weight = torch.randn(9, 20), torch.randn(20, 20)
    added = torch.randn(20) if bias else None
    token_slot = torch.tensor([-1, 0, 0, 1, 1, 1, 2, 2, 2]).int()
    base = torch.nn.functional.linear(x, weight, added)
    expected = base + lora_linear_reference(x, tables, token_slot)
    assert_close(lora_linear(x, weight, added, tables, batch_of(token_slot)), expected)
    assert torch.equal(lora_linear(x, weight, added, tables, None), base)


def test_ordered_batches_are_taken_as_they_come():
    segments = batch_of(torch.tensor([-1, -1, 0, 0, 2])).host_segments
    assert segments.order is None
    runs = zip(segments.slot, segments.first_row, segments.end_row, strict=True)
    assert [tuple(map(int, run)) for run in runs] == [(0, 2, 4), (2, 4, 5)]


def test_mixed_batches_are_sorted_once():
    segments = batch_of(torch.tensor([2, -1, 0, 2, 0])).host_segments
    assert segments.order is not None
    assert segments.order.tolist() == [1, 2, 4, 0, 3]
    assert segments.slot.tolist() == [0, 2]


def test_a_step_without_adapters_has_no_lora_batch():
    assert LoraBatch.from_token_slot(torch.full((5,), -1)) is None
    assert LoraBatch.from_token_slot(torch.empty(0, dtype=torch.int32)) is None


def test_one_output_may_be_a_view_of_a_larger_one():
    tables = random_dense_tables(1, 2, 16, (8,), ranks=(4,), absent=0.0)
    x, token_slot = torch.randn(6, 16), torch.tensor([0, 0, 1, 1, 1, 1])
    wide = torch.zeros(6, 20)
    lora_linear_(wide[:, 5:13], x, tables, batch_of(token_slot))
    assert_close(wide[:, 5:13], lora_linear_reference(x, tables, token_slot))
    assert not wide[:, :5].any()
    assert not wide[:, 13:].any()


def test_row_parallel_parts_sum_to_the_whole():
    """o_proj under TP 2: a rank holds a range of the input, so of the rows of A transposed."""
    tables = random_dense_tables(3, 3, 32, (12,), ranks=(4, 8), absent=0.0, a_transposed=True)
    x, token_slot = torch.randn(9, 32), torch.arange(9) % 3
    batch = batch_of(token_slot)
    total = torch.zeros(9, 12)
    for rank in range(2):
        mine = random_dense_tables(3, 3, 32, (12,), ranks=(4, 8), absent=0.0, a_transposed=True)
        mine.offset_a = tables.offset_a + rank * 16 * tables.rank
        lora_linear_(total, x[:, rank * 16 : rank * 16 + 16].contiguous(), mine, batch)
    assert_close(total, lora_linear_reference(x, tables, token_slot))
