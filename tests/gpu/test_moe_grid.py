"""What LoRA adds, measured alone, over the grid of sizes that other engines publish, and the layer
as a whole. All memory that kernels are given is poisoned."""

import pytest
import torch
from loraplex.kernels import MoeRunner, MoeWeights, fused_moe
from loraplex.kernels.gpu import FusedBackend, GemmTile, HookedBackend, MoeTiles, ShrinkTile

from ..kernels.cases import Layer
from ..kernels.poison import poisoned_memory
from . import reference
from .layers import LORA_ERROR, NEEDS_GPU, Case, assert_near, batch_of, random_layer
from .pairwise import pairs_of as value_pairs
from .pairwise import pairwise

FACTORS = {
    "tokens": (1, 2, 7, 16, 64, 257, 1024, 4096),
    "top_k": (1, 2, 6, 8, 12),
    "experts": (8, 64, 128, 256, 512),
    "adapters": (1, 4, 8, 32),
    "rank": (4, 8, 16, 32, 64, 128, 256),
    "bits_of_mantissa": (8, 11),
    "percent_skipped": (0, 50),
}
DTYPES = {8: torch.bfloat16, 11: torch.float16}


def _possible(case: dict[str, int]) -> bool:
    return case.get("top_k", 1) <= case.get("experts", 512)


GRID = pairwise(FACTORS, _possible)
CASES = [
    Case(
        values["tokens"], values["top_k"], values["experts"], values["adapters"], values["rank"],
        DTYPES[values["bits_of_mantissa"]], values["percent_skipped"] / 100,
    )
    for values in GRID
]  # fmt: skip

# Few cuts, each of its own kind: every one is compiled for both types.
SMALL = MoeTiles(
    16, GemmTile(32, 64, 4, 3), GemmTile(64, 64, 4, 3),
    ShrinkTile(4, 16, 64, 2), ShrinkTile(4, 16, 64, 2),
)  # fmt: skip
MIDDLE = MoeTiles(
    32, GemmTile(64, 64, 4, 3, expand_ahead=True), GemmTile(128, 64, 4, 3),
    ShrinkTile(2, 16, 64, 1), ShrinkTile(2, 32, 64, 1),
)  # fmt: skip
LARGE = MoeTiles(
    64, GemmTile(64, 64, 4, 3, tma=True, short=True), GemmTile(128, 64, 8, 3, persistent=1),
    ShrinkTile(2, 32, 64, 1), ShrinkTile(2, 64, 64, 1),
)  # fmt: skip


def tiles_for(tokens: int) -> MoeTiles:
    if tokens <= 16:
        return SMALL
    return MIDDLE if tokens <= 257 else LARGE


def test_every_two_values_of_the_grid_meet():
    met = {pair for case in GRID for pair in value_pairs(case)}
    names = list(FACTORS)
    for first, a in enumerate(names):
        for b in names[first + 1 :]:
            for x in FACTORS[a]:
                for y in FACTORS[b]:
                    assert (a, x, b, y) in met or not _possible({a: x, b: y})
    assert all(map(_possible, GRID))
    assert len(GRID) < 70


def rows_by_pair(values: torch.Tensor, batch) -> torch.Tensor:
    """values [rows, N] as [T * K, N], NaN where a pair is in no row."""
    rows = batch.rows
    pair = rows.sorted_pairs[: int(rows.num_blocks) * rows.block_size].long()
    here = (pair < rows.num_tokens * rows.top_k).nonzero().flatten()
    out = values.new_full((rows.num_tokens * rows.top_k, values.shape[1]), torch.nan)
    out[pair[here]] = values[here]
    return out


def check_gate_up_alone(layer: Layer, backend: FusedBackend, error: float) -> None:
    """Without base weights the activated intermediate is made of the adapters' part alone."""
    weights = MoeWeights(torch.zeros_like(layer.w13), layer.w2)
    pairs = reference.pairs_of(layer)
    with poisoned_memory():
        batch = backend.align(layer.topk_ids, batch_of(layer), weights)
        a = backend.first_half(layer.x, weights, batch, layer.tables, ())
    expected = reference.swiglu(reference.gate_up_delta(layer, pairs))
    assert_near(rows_by_pair(a, batch)[pairs.pair], expected, error)


def check_down_alone(layer: Layer, backend: FusedBackend, error: float) -> None:
    """Without base weights the output is made of the adapters' part of known activations."""
    weights = MoeWeights(layer.w13, torch.zeros_like(layer.w2))
    pairs = reference.pairs_of(layer)
    generator = torch.Generator(layer.x.device).manual_seed(1)
    shape = (layer.topk_ids.numel(), layer.w2.shape[2])
    known = torch.randn(*shape, generator=generator, device=layer.x.device).to(layer.x.dtype)
    with poisoned_memory():
        batch = backend.align(layer.topk_ids, batch_of(layer), weights)
        rows = batch.rows
        # Rows without a pair hold NaN.
        known_and_nan = torch.cat((known, known.new_full((1, shape[1]), torch.nan)))
        used = int(rows.num_blocks) * rows.block_size
        a = known.new_full((rows.max_blocks * rows.block_size, shape[1]), torch.nan)
        a[:used] = known_and_nan[rows.sorted_pairs[:used].long()]
        out = backend.second_half(
            a, weights, layer.topk_weights, layer.topk_ids, batch, layer.tables, ()
        )
    y = reference.down_delta(layer, pairs, known[pairs.pair].float())
    assert_near(out, reference.combine(layer, pairs, y), error)


def check_products_alone(layer: Layer, tiles: MoeTiles, error: float) -> None:
    """Both products of the backend that leaves LoRA to a pass of its own."""
    weights = MoeWeights(torch.zeros_like(layer.w13), torch.zeros_like(layer.w2))
    pairs = reference.pairs_of(layer)
    seen = []

    def keep(values, source, batch):
        seen.append((rows_by_pair(values, batch), source, batch))

    with poisoned_memory():
        MoeRunner(HookedBackend(tiles), (keep,), (keep,))(
            layer.x, weights, layer.topk_weights, layer.topk_ids, layer.tables, batch_of(layer)
        )
    (h, _, _), (y, a, batch) = seen
    assert_near(h[pairs.pair], reference.gate_up_delta(layer, pairs), error)
    known = rows_by_pair(a, batch)[pairs.pair].float()
    assert_near(y[pairs.pair], reference.down_delta(layer, pairs, known), error)


def run(layer: Layer, backend: FusedBackend) -> torch.Tensor:
    with poisoned_memory():
        out = MoeRunner(backend)(
            layer.x, layer.weights, layer.topk_weights, layer.topk_ids, layer.tables,
            batch_of(layer),
        )  # fmt: skip
    assert out.dtype == layer.x.dtype
    return out


class TestOnAGpu:
    pytestmark = NEEDS_GPU

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_the_fused_backend_over_the_grid(self, case):
        layer, error = random_layer(case), LORA_ERROR[case.dtype]
        backend = FusedBackend(tiles_for(case.tokens))
        check_gate_up_alone(layer, backend, error)
        check_down_alone(layer, backend, error)
        assert_near(run(layer, backend), reference.moe(layer), error)

    @pytest.mark.parametrize("dtype", LORA_ERROR, ids=str)
    @pytest.mark.parametrize("tokens", [1, 64, 1024])
    def test_factors_that_all_experts_share(self, tokens, dtype):
        """Four adapters, of which two share an outer factor and take the short way."""
        layer = random_layer(Case(tokens, 8, 64, 4, 16, dtype))
        backend = FusedBackend(tiles_for(tokens))
        layer.tables.shared_outer = True
        check_gate_up_alone(layer, backend, LORA_ERROR[dtype])
        check_down_alone(layer, backend, LORA_ERROR[dtype])
        assert_near(run(layer, backend), reference.moe(layer), LORA_ERROR[dtype])

    @pytest.mark.parametrize("case", CASES[::8], ids=str)
    def test_the_plain_stages(self, case):
        check_products_alone(random_layer(case), tiles_for(case.tokens), LORA_ERROR[case.dtype])

    @pytest.mark.parametrize("dtype", LORA_ERROR, ids=str)
    @pytest.mark.parametrize("tokens", [1, 40, 300, 1500, 5000])
    def test_the_tiles_that_a_layer_gets_when_none_are_given(self, tokens, dtype):
        layer = random_layer(Case(tokens, 2, 8, 4, 16, dtype))
        with poisoned_memory():
            lora = fused_moe(*layer.args(), layer.tables, layer.token_slot)
            base = fused_moe(*layer.args())
        assert_near(lora, reference.moe(layer), LORA_ERROR[dtype])
        assert_near(base, reference.moe(layer, adapted=False), LORA_ERROR[dtype])
