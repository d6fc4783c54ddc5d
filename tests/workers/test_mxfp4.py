"""MXFP4 checkpoints: the format by its definition, and a whole model against its floats."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import fields

import pytest
import torch
from loraplex.kernels import MoeRunner, backend_for
from loraplex.workers import EngineConfig
from loraplex.workers.comm import Comm
from loraplex.workers.models import load_model
from loraplex.workers.models.mxfp4 import dequantise
from loraplex.workers.shard import Shard
from loraplex.workers.weights import Checkpoint
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from .test_models import requests_for, same_logprobs
from .tiny_models import EXPERTS, HIDDEN, INTER, LAYERS, make_tiny_model


def e2m1(code: int) -> float:
    """Sign, two bits of exponent with bias 1, one bit of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return -size if sign else size


def test_codes_mean_what_the_format_says():
    blocks = torch.randint(0, 256, (3, 5, 16), dtype=torch.uint8)
    scales = torch.randint(0, 255, (3, 5), dtype=torch.uint8)
    scales[0, :4] = torch.tensor([0, 1, 127, 250])
    got = dequantise(blocks, scales, torch.float32)
    assert got.shape == (3, 5 * 32)
    for i, j, k in itertools.product(range(3), range(5), range(32)):
        byte = int(blocks[i, j, k // 2])
        value = e2m1(byte >> 4 if k % 2 else byte & 15)
        want = torch.tensor(math.ldexp(value, int(scales[i, j]) - 127), dtype=torch.float64)
        assert got[i, j * 32 + k] == want.float()  # beyond float32: infinite, as in a cast


def test_a_scale_that_is_no_number_makes_its_block_none():
    scales = torch.tensor([[127, 255]], dtype=torch.uint8)
    got = dequantise(torch.full((1, 2, 16), 0x22, dtype=torch.uint8), scales, torch.float32)
    assert torch.equal(got[0, :32], torch.ones(32))
    assert got[0, 32:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_those_of_transformers(dtype):
    blocks, scales = random_mxfp4(EXPERTS, 10, 96)
    want = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # [E, in, out]
    assert torch.equal(dequantise(blocks, scales, dtype), want.mT)


def random_mxfp4(experts: int, out: int, in_: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of up to about 0.4."""
    blocks = torch.randint(0, 256, (experts, out, in_ // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(120, 124, (experts, out, in_ // 32), dtype=torch.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with adapters, whose experts' weights are MXFP4's values, in two folders: as
    floats, and "mxfp4" as published checkpoints have them."""
    torch.set_num_threads(1)
    tiny = make_tiny_model("gpt_oss", tmp_path_factory.mktemp("gpt_oss"))
    tensors = load_file(tiny.folder / "model.safetensors")
    packed = dict(tensors)
    for n in range(LAYERS):
        for name, out, in_ in (
            ("gate_up_proj", 2 * INTER, HIDDEN), ("down_proj", HIDDEN, INTER)
        ):  # fmt: skip
            key = f"model.layers.{n}.mlp.experts.{name}"
            blocks, scales = random_mxfp4(EXPERTS, out, in_)
            values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            assert values.shape == tensors[key].shape
            tensors[key] = values
            del packed[key]
            packed[f"{key}_blocks"], packed[f"{key}_scales"] = blocks, scales
    save_file(tensors, tiny.folder / "model.safetensors")
    folder = tiny.folder.parent / "mxfp4"
    folder.mkdir()
    save_file(packed, folder / "model.safetensors")
    raw = json.loads((tiny.folder / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(raw))
    return tiny


def test_an_mxfp4_checkpoint_says_what_its_floats_say(model, run, greedy):
    _, requests = requests_for(model, greedy, 1)
    engines = [model.engine(), model.engine(model_path=str(model.folder.parent / "mxfp4"))]
    expected, results = (run(engine, requests) for engine in engines)
    for engine in engines:
        engine.close()
    for request_id, result in results.items():
        assert result.tokens == expected[request_id].tokens
        assert same_logprobs(result, expected[request_id])


@pytest.mark.parametrize("tp", [1, 2, 4])  # blocks of 32 over I = 32: ranks meet inside a block
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rank_has_its_part_and_says_before_how_much(model, tp, dtype, caplog):
    for rank in range(tp):
        caplog.clear()
        plain = experts_of(model.folder, rank, tp, dtype)
        assert not caplog.records
        packed = experts_of(model.folder.parent / "mxfp4", rank, tp, dtype)
        size = sum(w.w13.nbytes + w.w2.nbytes for w in packed)
        (record,) = caplog.records
        assert f"take {size} bytes" in record.getMessage()
        assert f"rank {rank} of {tp}" in record.getMessage()
        for mine, want in zip(packed, plain, strict=True):
            for f in fields(want):
                a, b = getattr(mine, f.name), getattr(want, f.name)
                assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, f.name
            assert (want.w2_bias is not None) == (rank == 0)
            assert want.w13.shape == (EXPERTS, 2 * INTER // tp, HIDDEN)
            assert want.w13_bias.shape == (EXPERTS, 2 * INTER // tp)


def experts_of(folder, rank, tp, dtype):
    config = EngineConfig(str(folder)).model
    shard, cpu = Shard(config, rank, tp), torch.device("cpu")
    with Checkpoint(folder, dtype, "cpu") as checkpoint:
        runner = MoeRunner(backend_for(cpu))
        model = load_model(config, shard, checkpoint, Comm(), runner, 16, cpu)
    return [layer.moe.experts for layer in model.layers]
