"""FP8 weights on a GPU: decoding as it is compiled, and layers against the float32 definition."""

import pytest
import torch
from loraplex.kernels import MoeRunner
from loraplex.kernels.gpu import FusedBackend, GemmTile, HookedBackend, MoeTiles, ShrinkTile

from ..kernels.cases import assert_close
from ..kernels.fp8 import fp8_layer
from ..kernels.fp8_decode import assert_every_code_is_decoded
from ..kernels.poison import poisoned_memory
from .layers import NEEDS_GPU, batch_of, on_gpu

pytestmark = NEEDS_GPU

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BACKENDS = {"fused": FusedBackend, "hooked": HookedBackend}
SHRINK = ShrinkTile(2, 16, 64, 1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_code_is_decoded_exactly(dtype):
    assert_every_code_is_decoded(dtype, "cuda")


def check(layer, backend, tolerance: float) -> None:
    expected, base = layer.expected(), layer.expected_base()
    layer = on_gpu(layer)
    args = (layer.x, layer.weights, layer.topk_weights, layer.topk_ids)
    with poisoned_memory():
        out = MoeRunner(backend)(*args, layer.tables, batch_of(layer))
        assert_close(out.cpu(), expected, tolerance)
        assert_close(MoeRunner(backend)(*args).cpu(), base, tolerance)


# Rows per expert of every height that the heuristic has.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 40, 150, 400])
@pytest.mark.parametrize(("hidden", "intermediate"), [(512, 384), (200, 128)])
def test_layers_are_as_the_definition_says(hidden, intermediate, tokens, dtype, backend):
    layer = fp8_layer(
        tokens, tokens, hidden=hidden, intermediate=intermediate, num_experts=4,
        skipped=0.3 * (tokens == 40), gpt_oss=tokens == 8, dtype=dtype,
    ).in_dtype(dtype)  # fmt: skip
    check(layer, BACKENDS[backend](), TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [3, 60])
def test_float32_activations(tokens):
    layer = fp8_layer(tokens, tokens, hidden=200, intermediate=128, num_experts=4)
    check(layer, FusedBackend(), TOLERANCE[torch.float32])


@pytest.mark.parametrize("tile", [
    GemmTile(32, 64, 4, 3),
    GemmTile(128, 128, 8, 2, expand_ahead=True),
    GemmTile(256, 64, 8, 2),  # columns of several blocks
    GemmTile(64, 128, 8, 3, persistent=1, tma=True, short=True),
], ids=str)  # fmt: skip
def test_other_tiles(tile):
    layer = fp8_layer(5, 300, hidden=384, intermediate=256, num_experts=3, dtype=torch.bfloat16)
    layer = layer.in_dtype(torch.bfloat16)
    check(layer, FusedBackend(MoeTiles(64, tile, tile, SHRINK, SHRINK)), 3e-2)
