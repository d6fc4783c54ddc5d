"""Dense LoRA's kernels against the reference."""

import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loraplex.kernels import DenseLoraTables, lora_linear_reference
from loraplex.kernels.gpu import lora_linear_

from ..cases import assert_close
from ..factors import random_dense_tables
from ..poison import poisoned_memory
from .layers import TOLERANCE, batch_of, examples, interpreted, laid_out

pytestmark = interpreted

module = importlib.import_module("loraplex.kernels.gpu.lora")


def add(out, x, tables, token_slot) -> torch.Tensor:
    with poisoned_memory():
        lora_linear_(out, x, tables, batch_of(token_slot))
    return out


@examples(50)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 40),
    in_size=st.integers(1, 70),
    out_sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    slots=st.integers(1, 6),
    ranks=st.sampled_from([(0, 1, 3, 8, 16), (2, 64), (8,), (0,), (5, 33)]),
    a_transposed=st.booleans(),
    is_ordered=st.booleans(),
    least_max_rank=st.booleans(),
    unused_slots=st.sampled_from([(), (0,)]),
    dtype=st.sampled_from(list(TOLERANCE)),
    pool=st.sampled_from(list(TOLERANCE)),
)
def test_any_batch_adds_what_the_reference_says(
    seed, tokens, in_size, out_sizes, slots, ranks, a_transposed, is_ordered, least_max_rank,
    unused_slots, dtype, pool,
):  # fmt: skip
    tables = random_dense_tables(
        seed, slots, in_size, tuple(out_sizes), ranks=ranks, a_transposed=a_transposed,
        unused_slots=unused_slots, dtype=pool,
    )  # fmt: skip
    if least_max_rank:
        tables.max_rank = max(1, int(tables.rank.max()))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, in_size, generator=generator).to(dtype)
    base = torch.randn(tokens, sum(out_sizes), generator=generator).to(dtype)
    token_slot = torch.randint(-1, slots, (tokens,), generator=generator).int()
    if is_ordered:
        token_slot = token_slot.sort().values
    out = add(base.clone(), x, tables, token_slot)
    assert_close(out, base + lora_linear_reference(x, tables, token_slot), TOLERANCE[dtype])


@pytest.mark.parametrize("a_transposed", [False, True])
def test_factors_of_whole_16_bytes(a_transposed):
    tables = random_dense_tables(
        1, 5, 48, (24, 8, 8), ranks=(0, 8, 24, 256), a_transposed=a_transposed, alignment=8
    )
    tables.rank_multiple = 8
    x, token_slot = torch.randn(20, 48), torch.arange(20, dtype=torch.int32) % 6 - 1
    out = add(torch.zeros(20, 40), x, tables, token_slot)
    assert_close(out, lora_linear_reference(x, tables, token_slot))


@pytest.mark.parametrize("tokens", [1, 16, 17, 257, 2049])
def test_blocks_grow_with_the_batch(tokens):
    tables = random_dense_tables(2, 3, 12, (8, 4), ranks=(2, 5))
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 12, generator=generator)
    token_slot = torch.randint(-1, 3, (tokens,), generator=generator).int()
    out = add(torch.zeros(tokens, 12), x, tables, token_slot)
    assert_close(out, lora_linear_reference(x, tables, token_slot))


def test_wide_outputs_of_large_batches_take_several_programs_of_several_tiles():
    tables = random_dense_tables(13, 3, 12, (1100, 70, 3, 600), ranks=(2, 40), alignment=8)
    generator = torch.Generator().manual_seed(13)
    x = torch.randn(2100, 12, generator=generator)
    token_slot = torch.randint(-1, 3, (2100,), generator=generator).int()
    base = torch.randn(2100, 1773, generator=generator)
    out = add(base.clone(), x, tables, token_slot)
    assert_close(out, base + lora_linear_reference(x, tables, token_slot))


def test_long_inputs_are_split_in_small_batches():
    tables = random_dense_tables(3, 2, 1100, (8, 4), ranks=(5, 20), absent=0.0)
    tables.pool *= 0.2
    x, token_slot = torch.randn(5, 1100), torch.tensor([1, -1, 0, 1, 0], dtype=torch.int32)
    assert module._dense_tile(5, 1100, 1)[1].splits > 1
    out = add(torch.zeros(5, 12), x, tables, token_slot)
    assert_close(out, lora_linear_reference(x, tables, token_slot))


def test_a_batch_without_adapters_is_left_as_it_was():
    tables = random_dense_tables(4, 2, 16, (8,), ranks=(4,))
    base = torch.randn(6, 8)
    nobody = torch.full((6,), -1, dtype=torch.int32)
    assert torch.equal(add(base.clone(), torch.randn(6, 16), tables, nobody), base)


def test_no_tokens():
    tables = random_dense_tables(5, 2, 16, (8,))
    add(torch.empty(0, 8), torch.empty(0, 16), tables, torch.empty(0, dtype=torch.int32))


def test_one_output_may_be_a_view_of_a_larger_one():
    tables = random_dense_tables(6, 2, 16, (8,), ranks=(4,), absent=0.0)
    x, token_slot = torch.randn(6, 16), torch.tensor([0, 0, 1, 1, 1, 1], dtype=torch.int32)
    wide = torch.zeros(6, 20)
    add(wide[:, 5:13], x, tables, token_slot)
    assert_close(wide[:, 5:13], lora_linear_reference(x, tables, token_slot))
    assert not wide[:, :5].any()
    assert not wide[:, 13:].any()


def test_the_input_may_be_a_part_of_wider_rows():
    tables = random_dense_tables(7, 2, 16, (8,), ranks=(4,), absent=0.0)
    x, token_slot = torch.randn(6, 16), torch.tensor([0, 0, 1, 1, 1, 1], dtype=torch.int32)
    out = add(torch.zeros(6, 8), laid_out(x, "part of wider rows"), tables, token_slot)
    assert_close(out, lora_linear_reference(x, tables, token_slot))


@pytest.mark.parametrize("ranks", [2, 3])
def test_row_parallel_parts_sum_to_the_whole(ranks):
    """o_proj under TP: a rank holds a range of the input, so of the rows of A transposed."""
    part = 16
    tables = random_dense_tables(
        8, 3, ranks * part, (12,), ranks=(4, 8), absent=0.0, a_transposed=True
    )
    x, token_slot = torch.randn(9, ranks * part), torch.arange(9, dtype=torch.int32) % 3
    total = torch.zeros(9, 12)
    for rank in range(ranks):
        mine = replace(tables, offset_a=tables.offset_a + rank * part * tables.rank)
        columns = x[:, rank * part : (rank + 1) * part].contiguous()
        add(total, columns, mine, token_slot)
    assert_close(total, lora_linear_reference(x, tables, token_slot))


def test_column_parallel_parts_are_the_wholes_columns():
    """q and k under TP: a rank holds a range of each output, so of the rows of each B."""
    tables = random_dense_tables(9, 3, 20, (12, 8), ranks=(4, 8), absent=0.0)
    x, token_slot = torch.randn(9, 20), torch.arange(9, dtype=torch.int32) % 3
    whole = lora_linear_reference(x, tables, token_slot)
    for rank in range(2):
        rows = torch.tensor([6, 4]) * rank
        mine = replace(tables, offset_b=tables.offset_b + rows * tables.rank, out_sizes=(6, 4))
        out = add(torch.zeros(9, 10), x, mine, token_slot)
        q, k = whole[:, :12].chunk(2, 1)[rank], whole[:, 12:].chunk(2, 1)[rank]
        assert_close(out, torch.cat((q, k), 1))


def test_a_poisoned_adapter_reaches_its_own_tokens_only():
    """By its A, which no other adapter's rows are multiplied with. B is taken as finite."""
    tables = random_dense_tables(10, 3, 16, (8,), ranks=(4,), absent=0.0)
    x, token_slot = torch.randn(9, 16), torch.arange(9, dtype=torch.int32) % 3
    before = add(torch.zeros(9, 8), x, tables, token_slot)
    spoilt: DenseLoraTables = replace(tables, pool=tables.pool.clone())
    offset = int(tables.offset_a[1, 0])
    spoilt.pool[offset : offset + 8 * 4] = torch.nan
    after = add(torch.zeros(9, 8), x, spoilt, token_slot)
    assert torch.equal(after[token_slot != 1], before[token_slot != 1])
    assert not torch.equal(after[token_slot == 1], before[token_slot == 1])


def test_an_input_whose_columns_lie_apart():
    tables = random_dense_tables(12, 2, 16, (8,), ranks=(4,), absent=0.0)
    x, token_slot = torch.randn(6, 16), torch.arange(6, dtype=torch.int32) % 2
    out = add(torch.zeros(6, 8), laid_out(x, "every other element"), tables, token_slot)
    assert_close(out, lora_linear_reference(x, tables, token_slot))
    with pytest.raises(ValueError, match="out must have its columns side by side"):
        add(laid_out(torch.zeros(6, 8), "every other element"), x, tables, token_slot)
