"""A node's memory for packs is pinned once in each rank's process, before the group is ready."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loraplex.adapter_store import DiskTier, HostTier, ModelSource, ObjectStore, host_memory
from loraplex.cluster.rank_program import RankProgram
from loraplex.workers.comm import Comm
from loraplex.workers.model_runner import ModelRunner
from loraplex.workers.pool.pinned import PinnedMemory


class Cuda:
    """Stands for the driver. Answers `code` to each registration."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int = 0):
        self.calls: list[tuple[int, int]] = []

        def register(start: int, nbytes: int, flags: int) -> int:
            self.calls.append((start, nbytes))
            return code

        runtime = SimpleNamespace(cudaHostRegister=register)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
        monkeypatch.setattr(PinnedMemory, "_forget_error", lambda self: None)


@pytest.fixture
def arena(tmp_path: Path, store: ObjectStore) -> Iterator[Path]:
    folder = Path("/dev/shm") / f"loraplex-test-{os.getpid()}-{time.time_ns()}"
    tier = HostTier(DiskTier(tmp_path, store, 1 << 20), 1 << 20, folder)
    yield folder
    tier.close()
    shutil.rmtree(folder, ignore_errors=True)


def test_memory_is_registered_once_and_all_in_it_is_pinned(monkeypatch):
    cuda, memory = Cuda(monkeypatch), np.zeros(100, np.uint8)
    pinned = PinnedMemory(torch.device("cuda"))
    assert not pinned.holds(memory)
    assert pinned.register(memory)
    assert pinned.register(memory[10:20])
    assert pinned.holds(memory[99:])
    assert not pinned.holds(np.zeros(4, np.uint8))
    assert cuda.calls == [(memory.ctypes.data, 100)]


def test_what_the_system_refuses_is_told_once_and_used_unpinned(monkeypatch, caplog):
    cuda, memory = Cuda(monkeypatch, code=2), np.zeros(100, np.uint8)
    pinned = PinnedMemory(torch.device("cuda"))
    with caplog.at_level(logging.WARNING):
        assert not pinned.register(memory)
        assert not pinned.register(memory)
    assert not pinned.holds(memory)
    assert len(cuda.calls) == len(caplog.messages) == 1
    assert "memlock" in caplog.text


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_pins_before_any_is_ready_and_its_pool_knows(demo, arena, monkeypatch, rank):
    cuda, told = Cuda(monkeypatch), []

    class OtherRanks(Comm):
        """They have come to every collective already."""

        def __init__(self):
            self.rank, self.size = rank, 2

        def all_reduce(self, x):
            told.append(len(cuda.calls))  # the first one says that all ranks have loaded
            return x

    init = PinnedMemory.__init__
    device = torch.device("cuda")
    monkeypatch.setattr(PinnedMemory, "__init__", lambda self, _: init(self, device))
    config = demo.config(host_folder=str(arena), tp_size=2, torch_threads=1)
    runner = ModelRunner(config, OtherRanks())
    memory = host_memory(arena)
    assert cuda.calls == [(memory.ctypes.data, 1 << 20)]
    assert told[0] == 1
    assert runner.pool.pinned.holds(memory[1000:2000])
    assert len(cuda.calls) == 1


def test_the_ranks_of_a_group_are_told_the_folder_of_their_tier(demo, tmp_path):
    model = ModelSource(str(demo.model), tmp_path)
    program = RankProgram(demo.config(), model, {}, tmp_path, 1 << 20, 1 << 20, tmp_path, demo.base)
    folder = program._config("tcp://127.0.0.1:1").host_folder
    assert Path(folder).parent == Path("/dev/shm")
    alone = replace(program, host_bytes=0)
    assert alone._config("tcp://127.0.0.1:1").host_folder is None
