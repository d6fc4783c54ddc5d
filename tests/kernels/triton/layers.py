"""Layers on Triton's CPU interpreter: tiles small enough for it, and every way to cut the work.

The interpreter computes bfloat16 wrongly, so that dtype is left to the tests on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from loraplex.kernels import LoraBatch, MoeBackend, MoeRunner
from loraplex.kernels.gpu import (
    FusedBackend,
    GemmTile,
    HookedBackend,
    MoeTiles,
    ShrinkTile,
    fused,
    hooked,
)
from triton import knobs

from ..cases import Layer, random_layer
from ..poison import poisoned_memory

interpreted = pytest.mark.skipif(
    not knobs.runtime.interpret,
    reason="needs Triton's interpreter: TRITON_INTERPRET=1 in the environment",
)


def examples(count: int) -> settings:
    """So many random ones. A failing one is shown as it was found: to make it smaller, hypothesis
    would try hundreds, and a try takes the interpreter up to a second."""
    return settings(max_examples=count, phases=(Phase.explicit, Phase.reuse, Phase.generate))


BACKENDS = {"fused": FusedBackend, "hooked": HookedBackend}
# Relative to the largest value. Half precision rounds x, the intermediate and s to 11 bits.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


def tiles(
    block_m: int = 16,
    block_n: int = 32,
    block_k: int = 32,
    *,
    expand_k: int = 32,
    persistent: int = 0,
    expand_ahead: bool = False,
    tma: bool = False,
    short: bool = False,
    groups: int = 2,
    rows: int = 16,
    splits: int = 1,
) -> MoeTiles:
    """One cut for both products."""
    gemm = GemmTile(
        block_n=block_n, block_k=block_k, warps=4, stages=2, persistent=persistent,
        expand_k=expand_k, expand_ahead=expand_ahead, tma=tma, short=short,
    )  # fmt: skip
    shrink = ShrinkTile(groups, rows, block_k, splits)
    return MoeTiles(block_m, gemm, gemm, shrink, shrink)


TILES = st.builds(
    tiles,
    block_m=st.sampled_from([16, 32]),
    block_n=st.sampled_from([16, 32, 64]),
    block_k=st.sampled_from([16, 32]),
    expand_k=st.sampled_from([16, 32, 64]),
    persistent=st.sampled_from([0, 1]),
    expand_ahead=st.booleans(),
    tma=st.booleans(),
    groups=st.integers(1, 3),
    rows=st.sampled_from([16, 32]),
    splits=st.integers(1, 3),
)


def batch_of(token_slot: torch.Tensor) -> LoraBatch:
    """As on a GPU: in an order of its own where slots decrease, and whether or not any is used."""
    if bool((token_slot.diff() >= 0).all()):
        return LoraBatch(token_slot, None)
    return LoraBatch(token_slot, token_slot.argsort(stable=True).int())


def ordered(layer: Layer) -> Layer:
    return replace(layer, token_slot=layer.token_slot.sort().values)


def aligned_layer(seed: int, tokens: int, **options) -> Layer:
    """One whose pool promises factors of whole 16 bytes."""
    options.setdefault("ranks", (0, 8, 16, 40))
    layer = random_layer(seed, tokens, alignment=8, **options)
    layer.tables.rank_multiple = 8
    return layer


LAYOUTS = ("part of wider rows", "every other element")


def laid_out(tensor: torch.Tensor, like: str) -> torch.Tensor:
    """Equal values, in memory as a part of something larger whose rest must not matter."""
    rest = torch.full_like(tensor, 77)
    if like == "every other element":
        result = torch.stack((tensor, rest), -1)[..., 0]
    else:
        result = torch.cat((tensor, rest), -1)[..., : tensor.shape[-1]]
    assert not result.is_contiguous()
    return result


@contextmanager
def persistent_grids(programs: int = 3) -> Iterator[None]:
    """Grids of so few programs where a tile asks for persistent ones, as if a GPU had no more
    multiprocessors."""

    def grid_size(tiles: int, tile: GemmTile, device: torch.device) -> int:
        return min(tiles, programs) if tile.persistent else tiles

    with (
        mock.patch.object(fused, "grid_size", grid_size),
        mock.patch.object(hooked, "grid_size", grid_size),
    ):
        yield


def run(layer: Layer, backend: MoeBackend, *, adapted: bool = True) -> torch.Tensor:
    """The layer's output, from memory in which nothing is zero by chance."""
    tables, batch = (layer.tables, batch_of(layer.token_slot)) if adapted else (None, None)
    with poisoned_memory(), persistent_grids():
        return MoeRunner(backend)(
            layer.x, layer.weights, layer.topk_weights, layer.topk_ids, tables, batch
        )
