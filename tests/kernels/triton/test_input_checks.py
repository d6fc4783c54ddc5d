"""Wrong input to the kernels ends in a ValueError that names the argument."""

import importlib
from dataclasses import replace
from unittest import mock

import pytest
import torch
from loraplex.kernels import ExpertLoraTables, LoraBatch, MoeRunner, fused_moe
from loraplex.kernels.gpu import FusedBackend, HookedBackend, lora_linear_

from .. import wrong_input
from ..cases import Layer, assert_close, random_layer
from ..factors import random_dense_tables
from .layers import LAYOUTS, batch_of, interpreted, laid_out, tiles

pytestmark = interpreted

moe = importlib.import_module("loraplex.kernels.moe")


def run(layer: Layer, backend=FusedBackend) -> torch.Tensor:
    """`fused_moe` as on a GPU."""
    with mock.patch.object(moe, "backend_for", return_value=backend(tiles())):
        batch = LoraBatch(layer.token_slot, None)
        return fused_moe(*layer.args(), layer.tables, batch, **layer.options())


@pytest.fixture(scope="module")
def layer() -> Layer:
    layer = random_layer(1, 20, gpt_oss=True)
    layer.token_slot = layer.token_slot.sort().values
    assert_close(run(layer), layer.expected())
    return layer


@pytest.mark.parametrize("backend", [FusedBackend, HookedBackend])
@pytest.mark.parametrize(
    ("name", "change", "message"), wrong_input.LAYER, ids=wrong_input.ids(wrong_input.LAYER)
)
def test_layers(layer, backend, name, change, message):
    with pytest.raises(ValueError, match=message):
        run(wrong_input.changed_layer(layer, name, change), backend)


@pytest.mark.parametrize("backend", [FusedBackend, HookedBackend])
@pytest.mark.parametrize(
    ("name", "change", "message"), wrong_input.TABLES, ids=wrong_input.ids(wrong_input.TABLES)
)
def test_expert_tables(layer, backend, name, change, message):
    with pytest.raises(ValueError, match=message):
        run(wrong_input.changed_tables(layer, name, change), backend)


@pytest.mark.parametrize("backend", [FusedBackend, HookedBackend])
def test_a_runner_reads_no_rows_that_x_has_not(layer, backend):
    """An engine calls the runner itself, without `fused_moe` and its checks."""
    with pytest.raises(ValueError, match=r"x must have shape \[20, any\], got \[4, 40\]"):
        MoeRunner(backend(tiles()))(layer.x[:4], layer.weights, layer.topk_weights, layer.topk_ids)


@pytest.mark.parametrize("like", LAYOUTS)
@pytest.mark.parametrize("name", ["w13", "w2", "w13_bias", "w2_bias"])
def test_weights_are_not_copied_in_silence(layer, name, like):
    """Nor misread: kernels take them as they lie, and a copy of them would cost gigabytes."""
    with pytest.raises(ValueError, match=f"{name} must be contiguous"):
        run(replace(layer, **{name: laid_out(getattr(layer, name), like)}))


@pytest.mark.parametrize(
    "name",
    ["pool", "offset_a13", "offset_b13", "offset_a2", "offset_b2", "rank", "scale", "layout"],
)
def test_tables_that_kernels_would_misread(layer, name):
    wrong = replace(
        layer.tables, **{name: laid_out(getattr(layer.tables, name), "every other element")}
    )
    with pytest.raises(ValueError, match=f"tables.{name} must be contiguous"):
        run(replace(layer, tables=wrong))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("offset_a13", torch.float32),
        ("offset_b2", torch.float32),
        ("rank", torch.float32),
        ("scale", torch.int32),
        ("layout", torch.float32),
    ],
)
def test_tables_of_types_that_make_no_sense(layer, name, dtype):
    table = getattr(layer.tables, name).to(dtype)
    with pytest.raises(ValueError, match=f"tables.{name} must be .*, got {dtype}"):
        run(replace(layer, tables=replace(layer.tables, **{name: table})))


@pytest.mark.parametrize("name", ["offset_a13", "rank", "scale", "layout"])
def test_tables_on_another_device(layer, name):
    tables: ExpertLoraTables = replace(
        layer.tables, **{name: getattr(layer.tables, name).to("meta")}
    )
    with pytest.raises(ValueError, match=f"tables.{name} must be on cpu, got meta"):
        run(replace(layer, tables=tables))


def test_more_projections_than_a_launch_takes():
    tables = random_dense_tables(1, 2, 16, (4,) * 5, ranks=(4,))
    with pytest.raises(ValueError, match=r"tables.out_sizes must have at most 4 .*, got 5"):
        lora_linear_(torch.zeros(6, 20), torch.zeros(6, 16), tables, batch_of(torch.zeros(6).int()))
