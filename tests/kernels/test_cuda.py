"""The torch backend on a GPU: the same code, off MKL."""

import dataclasses

import pytest
import torch
from loraplex.kernels import (
    DenseLoraTables,
    DenseSegments,
    ExpertLoraTables,
    fused_moe,
    lora_linear_,
    lora_linear_reference,
    moe_lora_align_block_size,
    moe_reference,
)

from .cases import assert_aligned, assert_close, random_layer
from .factors import random_dense_tables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _full_float32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(tables: ExpertLoraTables | DenseLoraTables):
    moved = {
        field.name: value.cuda()
        for field in dataclasses.fields(tables)
        if isinstance(value := getattr(tables, field.name), torch.Tensor)
    }
    return dataclasses.replace(tables, **moved)


@pytest.mark.parametrize("seed", range(12))
def test_moe_is_as_the_reference_says(seed):
    layer = random_layer(seed, 1 + 7 * seed, skipped=0.3 * (seed % 2))
    expected = moe_reference(*layer.args(), layer.tables, layer.token_slot)
    args = [tensor.cuda() for tensor in layer.args()]
    out = fused_moe(*args, on_gpu(layer.tables), layer.token_slot.cuda())
    assert_close(out.cpu(), expected)
    assert_close(fused_moe(*args).cpu(), moe_reference(*layer.args()))


def test_moe_in_bfloat16():
    layer = random_layer(20, 50, dtype=torch.bfloat16)
    layer.x, layer.w13, layer.w2 = (t.bfloat16() for t in (layer.x, layer.w13, layer.w2))
    expected = moe_reference(*layer.args(), layer.tables, layer.token_slot)
    args = [tensor.cuda() for tensor in layer.args()]
    out = fused_moe(*args, on_gpu(layer.tables), layer.token_slot.cuda())
    assert_close(out.cpu(), expected, tolerance=3e-2)


@pytest.mark.parametrize("a_transposed", [False, True])
def test_dense_lora_is_as_the_reference_says(a_transposed):
    tables = random_dense_tables(1, 5, 40, (24, 8, 8), a_transposed=a_transposed)
    x, token_slot = torch.randn(50, 40), torch.randint(-1, 5, (50,))
    out = torch.zeros(50, 40, device="cuda")
    segments = DenseSegments.from_token_slot(token_slot.cuda())
    lora_linear_(out, x.cuda(), on_gpu(tables), segments)
    assert_close(out.cpu(), lora_linear_reference(x, tables, token_slot))


@pytest.mark.parametrize("block_size", [1, 16])
def test_align_is_as_the_reference_says(block_size):
    layer = random_layer(21, 50, skipped=0.2)
    aligned = moe_lora_align_block_size(
        layer.topk_ids.cuda(), layer.token_slot.cuda(), block_size, 6
    )
    assert_aligned(aligned, layer.topk_ids, layer.token_slot, block_size, 6)
