"""Models of random weights: a config.json is all that they need."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import fields, is_dataclass

import pytest
import torch
from loraplex.adapter_store import BaseModel, BaseModelError
from loraplex.kernels import MoeRunner, backend_for
from loraplex.workers import Engine, EngineConfig, ModelFilesInvalid
from loraplex.workers.comm import Comm
from loraplex.workers.config import ModelConfig
from loraplex.workers.dummy_weights import DummyCheckpoint
from loraplex.workers.models import load_model
from loraplex.workers.shard import Shard
from loraplex.workers.weights import Checkpoint

from .conftest import LocalPacks
from .tiny_models import CONFIGS, VOCAB, make_tiny_model


@pytest.fixture(params=CONFIGS)
def tiny(request, tmp_path):
    """A saved tiny model, and a folder with nothing but its config.json."""
    torch.set_num_threads(1)
    model = make_tiny_model(request.param, tmp_path)
    (tmp_path / "config").mkdir()
    shutil.copy(model.folder / "config.json", tmp_path / "config")
    return model, tmp_path / "config"


def tensors_of(value: object, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor inside a loaded model, by where it stands."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    if isinstance(value, list):
        return {k: t for i, v in enumerate(value) for k, t in tensors_of(v, f"{path}.{i}").items()}
    if not is_dataclass(value):
        return {}
    parts = (tensors_of(getattr(value, f.name), f"{path}.{f.name}") for f in fields(value))
    return {k: t for part in parts for k, t in part.items()}


def loaded(folder, source, rank=0, size=1) -> dict[str, torch.Tensor]:
    config = ModelConfig.from_folder(folder)
    runner = MoeRunner(backend_for(torch.device("cpu")))
    comm = Comm()
    model = load_model(
        config, Shard(config, rank, size), source, comm, runner, 64, torch.device("cpu")
    )
    return tensors_of(model)


def test_shapes_are_those_of_the_checkpoint_on_every_rank(tiny):
    model, folder = tiny
    dummy = DummyCheckpoint(torch.float32, "cpu")
    with Checkpoint(model.folder, torch.float32, "cpu") as real:
        for rank, size in ((0, 1), (0, 2), (1, 2)):
            made, read = loaded(folder, dummy, rank, size), loaded(model.folder, real, rank, size)
            assert {k: t.shape for k, t in made.items()} == {k: t.shape for k, t in read.items()}
            assert all(t.is_contiguous() for t in made.values())


def test_values_are_normal_and_norms_are_one(tiny):
    _, folder = tiny
    for name, tensor in loaded(folder, DummyCheckpoint(torch.float32, "cpu")).items():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:
            n = tensor.numel()
            assert abs(tensor.mean()) < 6 * 0.02 / n**0.5, name
            assert abs(tensor.std() / 0.02 - 1) < 6 / (2 * n) ** 0.5, name


def test_an_engine_serves_it_with_adapters_and_says_the_same_each_time(tiny, run, greedy):
    model, folder = tiny
    base = BaseModel.from_folder(folder, dummy_weights=True)
    with pytest.raises(BaseModelError, match=r"no \*\.safetensors"):
        BaseModel.from_folder(folder)
    assert base.fingerprint != model.base.fingerprint
    ids = [random.randrange(VOCAB) for _ in range(20)]
    requests = [greedy(str(i), ids, ref) for i, ref in enumerate([None, *model.refs.values()])]
    answers = []
    for _ in range(2):
        config = EngineConfig(str(folder), load_format="dummy", pool_bytes=8 << 20, kv_tokens=2048)
        engine = Engine(config, model.packs)
        answers.append(run(engine, requests))
        report = engine.report()
        engine.close()
        held = loaded(folder, DummyCheckpoint(torch.float32, "cpu")).items()
        made = sum(t.nbytes for name, t in held if not name.startswith((".rope", ".moe.local")))
        assert report.weights_bytes == made
        assert report.ready_seconds > report.weights_seconds > 0
    first, second = answers
    for key, r in first.items():
        assert (r.last.error, len(r.tokens)) == (None, 12)
        assert second[key].tokens == r.tokens
        # Adapters come in the background: what shares a step with what differs, and rounding so.
        assert second[key].logprobs == pytest.approx(r.logprobs, abs=1e-5)
    assert len({tuple(r.logprobs) for r in first.values()}) == len(requests)


def test_what_ranks_hold_in_common_is_equal_and_what_is_cut_differs():
    dummy = DummyCheckpoint(torch.float32, "cpu")
    whole = [dummy.get("router", (8, 16)) for _ in range(2)]
    parts = [dummy.get("o_proj", (8, 16), cols=slice(c, c + 8)) for c in (0, 8)]
    assert torch.equal(*whole)
    assert parts[0].shape == parts[1].shape == (8, 8)
    assert not torch.equal(*parts)
    assert not torch.equal(whole[0], dummy.get("other", (8, 16)))


def test_a_checkpoint_that_doesnt_fit_its_config_is_refused_by_name(tmp_path):
    model = make_tiny_model("olmoe", tmp_path)
    config = json.loads((model.folder / "config.json").read_text())
    (model.folder / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB + 1}))
    with pytest.raises(
        ModelFilesInvalid,
        match=r"embed_tokens.weight' has shape \[128, 64\], config.json says \[129, 64\]",
    ):
        Engine(EngineConfig(str(model.folder)), LocalPacks())
