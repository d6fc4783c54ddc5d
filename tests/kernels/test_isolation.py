"""No adapter's factors or rows reach another's, and work follows what is active."""

from unittest import mock

import numpy as np
import pytest
import torch
from loraplex.kernels import fused_moe, low_rank, low_rank_gathered, mkl_gemm, moe_reference
from torch.utils._python_dispatch import TorchDispatchMode

from .cases import PRODUCTS, assert_close, products_by, random_layer


@pytest.mark.parametrize("way", PRODUCTS)
@pytest.mark.parametrize("seed", range(5))
def test_a_row_is_the_same_whatever_else_is_in_the_batch(way, seed):
    layer = random_layer(seed, 60)
    with products_by(way):
        together = fused_moe(*layer.args(), layer.tables, layer.token_slot)
        for t in range(0, 60, 7):
            one = slice(t, t + 1)
            alone = fused_moe(
                layer.x[one], layer.w13, layer.w2, layer.topk_weights[one], layer.topk_ids[one],
                layer.tables, layer.token_slot[one],
            )  # fmt: skip
            assert_close(together[one], alone)


@pytest.mark.parametrize("way", PRODUCTS)
def test_a_bad_row_stays_alone(way):
    """One tenant's non-finite activations leave all other tokens as they were."""
    layer = random_layer(6, 40, skipped=0.2)
    with products_by(way):
        before = fused_moe(*layer.args(), layer.tables, layer.token_slot)
        layer.x[17] = torch.nan
        after = fused_moe(*layer.args(), layer.tables, layer.token_slot)
    others = torch.arange(40) != 17
    assert_close(after[others], before[others])


@pytest.mark.parametrize("way", PRODUCTS)
def test_a_poisoned_adapter_reaches_its_own_tokens_only(way):
    layer = random_layer(7, 40, slots=3, ranks=(8,), layouts=(0,), absent=0.0)
    for expert in range(6):
        offset = int(layer.tables.offset_b2[1, expert])
        layer.tables.pool[offset : offset + 40 * 8] = torch.nan
    clean = random_layer(7, 40, slots=3, ranks=(8,), layouts=(0,), absent=0.0)
    with products_by(way):
        out = fused_moe(*layer.args(), layer.tables, layer.token_slot)
    expected = clean.expected()
    others = layer.token_slot != 1
    assert_close(out[others], expected[others])
    assert out[~others].isnan().all()


@pytest.mark.parametrize("way", PRODUCTS)
def test_unused_slots_are_not_read(way):
    """A slot that holds nothing may still have tokens (its ranks and scales are stale)."""
    layer = random_layer(8, 40, slots=3, ranks=(8,), unused_slots=(1,))
    expected = layer.expected()
    as_base = layer.token_slot.where(layer.token_slot != 1, -1)
    assert_close(expected, moe_reference(*layer.args(), layer.tables, as_base))
    with products_by(way):
        assert_close(fused_moe(*layer.args(), layer.tables, layer.token_slot), expected)


@pytest.mark.parametrize("way", PRODUCTS)
def test_work_follows_active_slots_not_configured_ones(way):
    few, many = (work_of(way, slots) for slots in (4, 256))
    assert few == many
    assert sum(few) > 0


def work_of(way: str, slots: int) -> list[int]:
    """Sizes of all that a batch over four slots computes: of torch results and of products."""
    layer = random_layer(9, 40, slots=slots, used_slots=(0, 1, 2, 3), ranks=(8,), layouts=(0,),
                         absent=0.0)  # fmt: skip
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            returned = [r.alias_info for r in func._schema.returns]
            is_view = any(alias is not None and not alias.is_write for alias in returned)
            if isinstance(result, torch.Tensor) and not is_view:
                sizes.append(result.numel())
            return result

    def counted(*, count, m, n, k, **rest):
        sizes.extend(np.broadcast_to(m * n * k, count).tolist())
        real(count=count, m=m, n=n, k=k, **rest)

    real = mkl_gemm.sgemm_batch
    with (
        products_by(way),
        Sizes(),
        mock.patch.object(mkl_gemm, "sgemm_batch", counted if way == "mkl" else real),
    ):
        fused_moe(*layer.args(), layer.tables, layer.token_slot)
    return sizes


@pytest.mark.parametrize("way", PRODUCTS)
def test_base_batches_do_no_lora_work(way):
    layer = random_layer(10, 30)
    nobody = torch.full((30,), -1, dtype=torch.int32)
    with (
        products_by(way),
        mock.patch.object(low_rank, "_shrink_mkl_", side_effect=AssertionError),
        mock.patch.object(low_rank, "shrink_gathered_", side_effect=AssertionError),
    ):
        assert_close(fused_moe(*layer.args(), layer.tables, nobody), layer.expected_base())


def test_gathers_are_cut_to_bounded_memory(monkeypatch):
    layer = random_layer(11, 60, ranks=(8, 16))
    monkeypatch.setattr(low_rank_gathered, "GATHER_ELEMENTS", 2000)
    largest = 0
    gather = low_rank_gathered._gather_blocks

    def watched(pool, offset, size):
        nonlocal largest
        largest = max(largest, offset.size * size)
        return gather(pool, offset, size)

    monkeypatch.setattr(low_rank_gathered, "_gather_blocks", watched)
    with products_by("torch"):
        out = fused_moe(*layer.args(), layer.tables, layer.token_slot)
    assert 0 < largest <= 2000
    assert_close(out, layer.expected())
