"""User hooks on the Triton backends: the fused one falls back to stages where they look in."""

import pytest
import torch
from loraplex.kernels import MoeRunner, gather_factors
from loraplex.kernels.gpu import FusedBackend, HookedBackend

from ..cases import Layer, assert_close, random_layer
from ..hooks import BiasHooks
from ..poison import poisoned_memory
from .layers import BACKENDS, TOLERANCE, batch_of, interpreted, tiles

pytestmark = interpreted


def pairs_of(batch):
    """Pair of each row, and whether the row holds one."""
    rows = batch.rows
    used = int(rows.num_blocks) * rows.block_size
    pair = rows.sorted_pairs[:used]
    return pair, pair < rows.num_tokens * rows.top_k


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_hooks_see_and_change_what_lies_between_the_stages(backend, adapted, dtype):
    layer = random_layer(1, 12, skipped=0.3).in_dtype(dtype)
    lora_batch = batch_of(layer.token_slot) if adapted else None
    hooks = BiasHooks(layer, pairs_of)
    with poisoned_memory():
        hooks.assert_seen_by(BACKENDS[backend](tiles()), lora_batch, TOLERANCE[dtype])


def test_one_hook_alone_leaves_the_other_half_fused():
    layer = random_layer(2, 12)
    lora_batch, seen = batch_of(layer.token_slot), []
    args = (layer.x, layer.weights, layer.topk_weights, layer.topk_ids, layer.tables, lora_batch)

    def look(values, source, batch):
        seen.append(values.shape)

    for hooks in ({"after_gate_up": (look,)}, {"before_combine": (look,)}):
        with poisoned_memory():
            out = MoeRunner(FusedBackend(tiles()), **hooks)(*args)
        assert_close(out, layer.expected())
    (_, columns_h), (_, columns_y) = seen
    assert (columns_h, columns_y) == (2 * layer.w2.shape[2], layer.x.shape[1])


def products_of(layer: Layer, pair: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token, gate and up products of a pair, LoRA included."""
    token, k = divmod(pair, layer.topk_ids.shape[1])
    expert, slot = int(layer.topk_ids[token, k]), int(layer.token_slot[token])
    x, intermediate = layer.x[token], layer.w2.shape[2]
    gate, up = (layer.w13[expert] @ x).split(intermediate)
    if slot >= 0:
        a, b, _ = gather_factors(layer.tables, slot, expert, x.shape[0], intermediate)
        gate = gate if a is None else gate + a.delta(x)
        up = up if b is None else up + b.delta(x)
    return gate, up, torch.nn.functional.silu(gate) * up


def down_of(layer: Layer, pair: int, a: torch.Tensor) -> torch.Tensor:
    token, k = divmod(pair, layer.topk_ids.shape[1])
    expert, slot = int(layer.topk_ids[token, k]), int(layer.token_slot[token])
    y = layer.w2[expert] @ a
    if slot >= 0:
        factors = gather_factors(layer.tables, slot, expert, layer.x.shape[1], a.shape[0])[2]
        y = y if factors is None else y + factors.delta(a)
    return y


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_the_pairs_in_the_order_of_the_batch(backend):
    layer = random_layer(3, 12, skipped=0.2)
    seen = []

    def after_gate_up(h, x, batch):
        assert x is layer.x
        for row, pair in enumerate(pairs_of(batch)[0].tolist()):
            if pair < layer.topk_ids.numel():
                gate, up, _ = products_of(layer, pair)
                assert_close(h[row], torch.cat((gate, up)))
                seen.append(pair)

    def before_combine(y, a, batch):
        for row, pair in enumerate(pairs_of(batch)[0].tolist()):
            if pair < layer.topk_ids.numel():
                _, _, activated = products_of(layer, pair)
                assert_close(a[row], activated)
                assert_close(y[row], down_of(layer, pair, activated))
                seen.append(pair)

    runner = MoeRunner(BACKENDS[backend](tiles()), (after_gate_up,), (before_combine,))
    with poisoned_memory():
        runner(
            layer.x, layer.weights, layer.topk_weights, layer.topk_ids, layer.tables,
            batch_of(layer.token_slot),
        )  # fmt: skip
    here = (layer.topk_ids.reshape(-1) >= 0).nonzero().flatten().tolist()
    assert sorted(seen) == sorted(here * 2)


def test_both_backends_give_the_same_stages():
    """What hooks are given doesn't depend on which of the two backends called them."""
    layer = random_layer(4, 12)
    args = (layer.x, layer.weights, layer.topk_weights, layer.topk_ids, layer.tables)
    seen = {}
    for backend in (FusedBackend, HookedBackend):

        def keep(values, source, batch, into=backend):
            pair, here = pairs_of(batch)
            rows = here.nonzero().flatten()
            seen.setdefault(into, []).append(values[rows][pair[rows].argsort()])

        MoeRunner(backend(tiles()), (keep,), (keep,))(*args, batch_of(layer.token_slot))
    for fused, hooked in zip(seen[FusedBackend], seen[HookedBackend], strict=True):
        assert torch.equal(fused, hooked)
