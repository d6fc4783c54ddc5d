"""Every public operation on a GPU against its definition, on the small random cases of the CPU
tests: odd sizes, mixed ranks, and NaN in the pool wherever no table points."""

import pytest
import torch
from loraplex.kernels import (
    LoraBatch,
    MoeRunner,
    TorchBackend,
    fused_moe,
    lora_linear_,
    lora_linear_reference,
    moe_lora_align_block_size,
)
from loraplex.kernels.gpu import HookedBackend

from ..kernels import wrong_input
from ..kernels.cases import Layer, assert_aligned, assert_close, listed_segments, random_layer
from ..kernels.factors import random_dense_tables, random_routing
from ..kernels.poison import poisoned_memory
from ..kernels.shares import ep_share, tp_share
from .layers import DEVICE, NEEDS_GPU, batch_of, on_gpu

pytestmark = NEEDS_GPU

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def run(layer: Layer) -> torch.Tensor:
    return fused_moe(*layer.args(), layer.tables, layer.token_slot, **layer.options())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_layers_are_as_the_definition_says(seed, dtype):
    layer = random_layer(
        seed, 1 + 9 * seed, skipped=0.3 * (seed % 2), gpt_oss=seed == 4, dtype=dtype
    ).in_dtype(dtype)
    expected, base = layer.expected(), layer.expected_base()
    layer = on_gpu(layer)
    with poisoned_memory():
        assert_close(run(layer).cpu(), expected, TOLERANCE[dtype])
        out = MoeRunner(HookedBackend())(
            layer.x, layer.weights, layer.topk_weights, layer.topk_ids, layer.tables,
            batch_of(layer),
        )  # fmt: skip
        assert_close(out.cpu(), expected, TOLERANCE[dtype])
        out = fused_moe(*layer.args(), **layer.options())
        assert_close(out.cpu(), base, TOLERANCE[dtype])


def test_the_torch_backend_runs_on_a_gpu_too():
    layer = random_layer(7, 40, skipped=0.2, gpt_oss=True)
    expected, base = layer.expected(), layer.expected_base()
    layer = on_gpu(layer)
    runner = MoeRunner(TorchBackend())
    args = (layer.x, layer.weights, layer.topk_weights, layer.topk_ids)
    assert_close(runner(*args, layer.tables, batch_of(layer)).cpu(), expected)
    assert_close(runner(*args).cpu(), base)


def test_factors_of_another_precision_than_the_activations():
    layer = random_layer(8, 30, dtype=torch.float32)
    layer = layer.in_dtype(torch.bfloat16)
    assert_close(run(on_gpu(layer)).cpu(), layer.expected(), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("size", [2, 4])
def test_tp_ranks_sum_to_the_unsharded_layer(size):
    layer = random_layer(9, 30)
    parts = [run(on_gpu(tp_share(layer, rank, size))) for rank in range(size)]
    assert_close(torch.stack(parts).sum(0).cpu(), layer.expected(), TOLERANCE[torch.float32])


def test_ep_ranks_skip_others_experts_and_sum_to_the_whole():
    layer = random_layer(10, 30)
    parts = [run(on_gpu(ep_share(layer, rank, 3))) for rank in range(3)]
    assert_close(torch.stack(parts).sum(0).cpu(), layer.expected(), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 50, 300, 2100])
def test_dense_lora_is_as_the_definition_says(tokens, a_transposed, dtype):
    tables = random_dense_tables(
        1, 5, 40, (24, 8, 8), a_transposed=a_transposed, ranks=(0, 1, 3, 16, 40), dtype=dtype
    )
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 40, generator=generator).to(dtype)
    base = torch.randn(tokens, 40, generator=generator).to(dtype)
    token_slot = torch.randint(-1, 5, (tokens,), generator=generator).int()
    expected = base + lora_linear_reference(x, tables, token_slot)
    out = base.to(DEVICE)
    batch = LoraBatch.from_token_slot(token_slot.to(DEVICE))
    assert batch is not None
    with poisoned_memory():
        lora_linear_(out, x.to(DEVICE), on_gpu(tables), batch)
    assert_close(out.cpu(), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("tokens", [1, 50, 900])
def test_align_is_as_the_definition_says(tokens, block_size):
    _, ids = random_routing(tokens, tokens, 12, 6, skipped=0.2)
    token_slot = torch.randint(-1, 9, (tokens,), generator=torch.Generator().manual_seed(1)).int()
    with poisoned_memory():
        aligned = moe_lora_align_block_size(ids.to(DEVICE), token_slot.to(DEVICE), block_size, 12)
    assert_aligned(aligned, ids, token_slot, block_size, 12)


@pytest.mark.parametrize(("tokens", "top_k", "experts", "block_size"), [
    (64, 8, 128, 16),
    (8192, 8, 128, 128),
    (65536, 8, 512, 128),
    (5000, 1, 7, 64),
])  # fmt: skip
@pytest.mark.parametrize("ordered", [True, False])
def test_align_of_large_batches_is_as_on_cpu(tokens, top_k, experts, block_size, ordered):
    torch.manual_seed(tokens)
    scores = torch.rand(tokens, experts, device=DEVICE)
    ids = scores.topk(top_k).indices.int().cpu()
    ids[torch.rand(ids.shape) < 0.1] = -1
    token_slot = torch.randint(-1, 64, (tokens,)).int()
    if ordered:
        token_slot = token_slot.sort().values
    ours = moe_lora_align_block_size(ids, token_slot, block_size, experts)
    lora_batch = LoraBatch.from_token_slot(token_slot.to(DEVICE), ordered=ordered)
    with poisoned_memory():
        theirs = moe_lora_align_block_size(ids.to(DEVICE), lora_batch, block_size, experts)
    blocks = int(ours.num_blocks)
    assert int(theirs.num_blocks) == blocks
    for name, count in (
        ("sorted_pairs", blocks * block_size),
        ("block_expert", blocks),
        ("block_end", blocks),
    ):
        assert torch.equal(getattr(ours, name)[:count], getattr(theirs, name)[:count].cpu())
    assert listed_segments(ours) == listed_segments(theirs)


@pytest.mark.parametrize(
    ("name", "change", "message"), wrong_input.LAYER, ids=wrong_input.ids(wrong_input.LAYER)
)
def test_wrong_layers_are_refused(name, change, message):
    layer = on_gpu(random_layer(1, 20, gpt_oss=True))
    wrong = wrong_input.changed_layer(layer, name, change)
    with pytest.raises(ValueError, match=message):
        run(wrong)


@pytest.mark.parametrize(
    ("name", "change", "message"), wrong_input.TABLES, ids=wrong_input.ids(wrong_input.TABLES)
)
def test_wrong_tables_are_refused(name, change, message):
    layer = on_gpu(random_layer(1, 20))
    wrong = wrong_input.changed_tables(layer, name, change)
    with pytest.raises(ValueError, match=message):
        run(wrong)
