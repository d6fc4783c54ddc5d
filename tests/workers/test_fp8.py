"""FP8 checkpoints as DeepSeek-V3 and Qwen3-*-FP8 are published, against their values as floats."""

from __future__ import annotations

import json
import random
import re
import socket
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from loraplex.adapter_store import BaseModel, Pack, write_pack
from loraplex.kernels import (
    FP8,
    FP8_BLOCK,
    MoeRunner,
    MoeWeights,
    backend_for,
    dequantise_fp8,
    fp8_blocks,
)
from loraplex.workers import (
    AdapterRef,
    Engine,
    EngineConfig,
    ModelFilesInvalid,
    ModelUnsupported,
    run_follower,
)
from loraplex.workers.comm import Comm
from loraplex.workers.config import ModelConfig
from loraplex.workers.dummy_weights import DummyCheckpoint
from loraplex.workers.families import FP8_BLOCK as CONFIG_BLOCK
from loraplex.workers.models import load_model
from loraplex.workers.models.fp8 import check_device
from loraplex.workers.shard import Shard
from loraplex.workers.weights import Checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.adapters import random_canonical

from .conftest import TENANT, LocalPacks
from .tiny_models import CONFIGS, EXPERTS, LAYERS, VOCAB

HIDDEN, INTER = 160, 256  # a block and a part of one; two blocks, for two ranks
QUANTISATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
CPU = torch.device("cpu")
# What a checkpoint leaves as it is, beside embeddings and norms; the last is as listed under
# `modules_to_not_convert`.
PLAIN = (
    "lm_head.weight",
    "mlp.gate.weight",
    "embed_tokens.weight",
    "layers.1.self_attn.o_proj.weight",
)


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each block's largest value becomes 448, e4m3's largest."""
    scale = torch.zeros(*map(fp8_blocks, weight.shape))
    codes = torch.zeros(weight.shape, dtype=FP8)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (
                slice(FP8_BLOCK * i, FP8_BLOCK * (i + 1)),
                slice(FP8_BLOCK * j, FP8_BLOCK * (j + 1)),
            )
            scale[i, j] = weight[block].abs().max() / 448
            codes[block] = (weight[block] / scale[i, j]).to(FP8)
    return codes, scale


@dataclass
class Fp8Model:
    """One model in two folders, and an adapter of all that can be adapted, and one of some."""

    fp8: Path
    floats: Path
    refs: list[AdapterRef]
    packs: LocalPacks

    def config(self, folder: Path, **changes: Any) -> EngineConfig:
        return EngineConfig(str(folder), pool_bytes=16 << 20, kv_tokens=2048, **changes)


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def model(request, tmp_path_factory) -> Fp8Model:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    config = deepcopy(CONFIGS[request.param])
    config.hidden_size, config.moe_intermediate_size = HIDDEN, INTER
    config.initializer_range = 0.08
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "floats")
    tensors = load_file(folder / "floats" / "model.safetensors")
    raw = json.loads((folder / "floats" / "config.json").read_text())
    codes = {}
    for name, tensor in list(tensors.items()):
        if tensor.dim() != 2 or name.endswith(PLAIN):
            codes[name] = tensor
            continue
        codes[name], scale = quantise(tensor)
        codes[f"{name}_scale_inv"] = scale
        tensors[name] = dequantise_fp8(codes[name], scale)
    (folder / "fp8").mkdir()
    save_file(tensors, folder / "floats" / "model.safetensors", {"format": "pt"})
    save_file(codes, folder / "fp8" / "model.safetensors", {"format": "pt"})
    (folder / "fp8" / "config.json").write_text(
        json.dumps(raw | {"quantization_config": QUANTISATION})
    )
    base = BaseModel.from_folder(folder / "fp8")
    made = Fp8Model(folder / "fp8", folder / "floats", [], LocalPacks())
    for seed, experts in enumerate((None, {0: (4, 4, 4), 5: (3, 0, 7)})):
        path = folder / f"{seed}.pack"
        adapter = random_canonical(
            base, seed, experts=experts, layers=base.moe_layers,
            dense={name: 3 for name in base.dense_targets if not name.startswith("mlp.")},
        )  # fmt: skip
        write_pack(path, adapter)
        ref = AdapterRef(TENANT, Pack.open(path).digest)
        made.refs.append(ref)
        made.packs.paths[ref.key] = path
    return made


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 2), (2, 1)])
def test_an_fp8_checkpoint_says_what_its_floats_say(model, tp, ep, run, greedy):
    rng = random.Random()
    requests = [
        greedy(str(i), [rng.randrange(VOCAB) for _ in range(rng.randrange(2, 50))], ref,
               prompt_logprobs=0)
        for i, ref in enumerate([None, *model.refs] * 2)
    ]  # fmt: skip
    whole = Engine(model.config(model.floats), model.packs)
    expected = run(whole, requests)
    whole.close()
    config = model.config(
        model.fp8, tp_size=tp, ep_size=ep, rendezvous=f"tcp://127.0.0.1:{free_port()}",
        torch_threads=1,
    )  # fmt: skip
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as processes:
        followers = [processes.submit(run_follower, config, rank) for rank in range(1, tp)]
        engine = Engine(config, model.packs)
        results = run(engine, requests)
        engine.close()
        for follower in followers:
            follower.result(20)
    for request_id, result in results.items():
        reference = expected[request_id]
        assert result.last.error is None
        assert result.tokens == reference.tokens
        mine = torch.tensor(result.prompt_logprobs + result.logprobs)
        theirs = torch.tensor(reference.prompt_logprobs + reference.logprobs)
        assert (mine - theirs).abs().max() <= 1e-4


def loaded(folder: Path, dtype=torch.float32, rank=0, tp=1, ep=1, source=None) -> list[Any]:
    """Layers of one rank."""
    config = ModelConfig.from_folder(folder)
    shard, runner = Shard(config, rank, tp, ep), MoeRunner(backend_for(CPU))
    if source is not None:
        return list(load_model(config, shard, source, Comm(), runner, 64, CPU).layers)
    with Checkpoint(folder, dtype, "cpu") as checkpoint:
        return list(load_model(config, shard, checkpoint, Comm(), runner, 64, CPU).layers)


def tensors_of(value: object, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a loaded model by where it stands, experts' weights as floats."""
    if isinstance(value, MoeWeights) and value.w13_scale is not None and value.w2_scale is not None:
        assert (value.w13.dtype, value.w2.dtype) == (FP8, FP8)
        value.check(torch.zeros(1, HIDDEN))
        return {
            f"{path}.w13": dequantise_fp8(value.w13, value.w13_scale),
            f"{path}.w2": dequantise_fp8(value.w2, value.w2_scale),
        }
    if isinstance(value, torch.Tensor):
        return {path: value}
    if isinstance(value, list):
        return {k: t for i, v in enumerate(value) for k, t in tensors_of(v, f"{path}.{i}").items()}
    if not is_dataclass(value):
        return {}
    parts = (tensors_of(getattr(value, f.name), f"{path}.{f.name}") for f in fields(value))
    return {k: t for part in parts for k, t in part.items()}


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rank_has_its_part_and_says_how_much(model, tp, ep, dtype, caplog):
    for rank in range(tp):
        caplog.clear()
        got, want = (loaded(folder, dtype, rank, tp, ep) for folder in (model.fp8, model.floats))
        experts = [layer.moe.experts for layer in got if hasattr(layer.moe, "experts")]
        assert len(experts) == LAYERS - ModelConfig.from_folder(model.fp8).dense_layers
        names = ("w13", "w2", "w13_scale", "w2_scale")
        size = sum(getattr(w, name).nbytes for w in experts for name in names)
        (record,) = caplog.records
        assert f"rank {rank} of {tp}" in record.getMessage()
        assert f"experts stay so, in {size} bytes" in record.getMessage()
        assert f"dequantised to {str(dtype).removeprefix('torch.')}" in record.getMessage()
        found, expected = tensors_of(got), tensors_of(want)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            mine = found[name].to(dtype) if ".experts" in name else found[name]
            assert mine.dtype == tensor.dtype, name
            assert torch.equal(mine, tensor), name


def test_the_log_counts_what_is_dequantised(model, caplog):
    layers = loaded(model.fp8, torch.bfloat16)
    plain = load_file(model.fp8 / "model.safetensors")
    of_others = [
        t for name, t in plain.items()
        if t.dtype == FP8 and ".experts." not in name
    ]  # fmt: skip
    size = sum(t.numel() * 2 for t in of_others)
    assert f"which takes {size} bytes" in caplog.records[0].getMessage()
    assert layers


def test_experts_that_arent_quantised_are_plain(model, tmp_path):
    tensors = load_file(model.fp8 / "model.safetensors")
    floats = load_file(model.floats / "model.safetensors")
    for name in [n for n in tensors if ".layers.1.mlp.experts." in f".{n}"]:
        if name.endswith("_scale_inv"):
            del tensors[name]
        else:
            tensors[name] = floats[name]
    write(tmp_path, model, tensors)
    got, want = loaded(tmp_path)[1].moe.experts, loaded(model.floats)[1].moe.experts
    assert got.w13_scale is None
    assert torch.equal(got.w13, want.w13)
    assert torch.equal(got.w2, want.w2)


def write(folder: Path, model: Fp8Model, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").symlink_to(model.fp8 / "config.json")


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def test_tensors_that_dont_belong_together_are_refused_by_name(model, tmp_path):
    tensors = load_file(model.fp8 / "model.safetensors")
    attention = "model.layers.1.self_attn.o_proj.weight"
    broken: list[tuple[dict[str, torch.Tensor | None], str]] = [
        ({f"{EXPERT}_scale_inv": None}, f"no shard holds the tensor '{EXPERT}_scale_inv'"),
        ({EXPERT: tensors[EXPERT].bfloat16()}, f"'{EXPERT}' is of torch.bfloat16, torch.float8"),
        (
            {f"{EXPERT}_scale_inv": torch.ones(1, 1)},
            rf"'{EXPERT}_scale_inv' has shape \[1, 1\], config.json says \[2, 2\]",
        ),
        (
            {attention: tensors[attention].to(FP8)},
            f"'{attention}' is of torch.float8_e4m3fn, torch.float32 is needed",
        ),
    ]
    for nth, (changes, message) in enumerate(broken):
        folder = tmp_path / str(nth)
        folder.mkdir()
        changed = {k: t for k, t in (tensors | changes).items() if t is not None}
        write(folder, model, changed)
        with pytest.raises(ModelFilesInvalid, match=message):
            loaded(folder)


def test_scales_may_be_of_any_float_type(model, tmp_path):
    """Qwen's are bfloat16."""
    tensors = load_file(model.fp8 / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        tensors[name] = tensors[name].bfloat16()
    write(tmp_path, model, tensors)
    experts = loaded(tmp_path)[1].moe.experts
    assert experts.w13_scale.dtype == torch.float32
    assert experts.w13_scale[2, 2, 1] == tensors[f"{EXPERT}_scale_inv"][0, 1]  # up's first


def test_dummy_weights_are_fp8_too(model):
    layers = loaded(model.fp8, source=DummyCheckpoint(torch.bfloat16, "cpu"))
    experts = layers[1].moe.experts
    assert (experts.w13.shape, experts.w2.shape) == (
        (EXPERTS, 2 * INTER, HIDDEN),
        (EXPERTS, HIDDEN, INTER),
    )
    experts.check(torch.zeros(1, HIDDEN))
    for codes, scale in ((experts.w13, experts.w13_scale), (experts.w2, experts.w2_scale)):
        values = dequantise_fp8(codes, scale)
        assert abs(values.std() / 0.02 - 1) < 0.02
        assert abs(values.mean()) < 1e-3
    assert layers[1].attention.o.dtype == torch.bfloat16


def test_parts_within_a_block_are_refused(model):
    config = ModelConfig.from_folder(model.fp8)
    with pytest.raises(
        ModelUnsupported,
        match=r"tp size 4 / ep size 1 = 4 cuts moe_intermediate_size = 256 .* 128-blocks .* use "
        "--ep",
    ):
        Shard(config, 0, 4, 1)
    Shard(config, 0, 4, 2)
    with pytest.raises(
        ModelUnsupported, match="moe_intermediate_size = 192 isn't a multiple of 128"
    ):
        Shard(replace(config, moe_intermediate_size=192), 0, 1)
    Shard(replace(config, moe_intermediate_size=192, quantisation=None), 0, 1)


def test_configs_and_kernels_agree_on_blocks():
    assert CONFIG_BLOCK == FP8_BLOCK


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_block_size": [64, 128]}, "weight_block_size = [64, 128]; FP8 weights are served"),
        ({"weight_block_size": None}, "weight_block_size = None; FP8 weights are served with [128"),
        ({"fmt": "e5m2"}, "fmt = 'e5m2'; FP8 weights are served with 'e4m3'"),
        ({"activation_scheme": "static"}, "activation_scheme = 'static'; FP8 weights are served"),
    ],
)
def test_other_formats_are_refused_by_name(model, tmp_path, changes, message):
    raw = json.loads((model.fp8 / "config.json").read_text())
    raw["quantization_config"] = QUANTISATION | changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelUnsupported, match=re.escape(message)):
        ModelConfig.from_folder(tmp_path)
    del raw["quantization_config"]["weight_block_size"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelUnsupported, match="weight_block_size = None"):
        ModelConfig.from_folder(tmp_path)


def test_gpus_that_cant_convert_are_refused(monkeypatch):
    check_device(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ModelUnsupported, match=r"capability 8\.9 or higher, this one has 8\.0"):
        check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    check_device(torch.device("cuda"))
