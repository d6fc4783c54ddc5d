"""What the ranks of a worker group run, as it travels to them: an engine on the settings."""

from __future__ import annotations

import atexit
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter_store import BaseModel, ModelSource
from .errors import SettingsError
from .logs import LogConfig, configure_logs
from .model import model_source
from .settings import Settings

if TYPE_CHECKING:
    from ..workers import EngineConfig, EngineLike, PackSource


DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class RankProgram:
    """Picklable; torch is imported where it runs.

    Args:
        config: without the rendezvous, which each group has its own of, and with the model's path
            on another machine.
        model: where the model comes from.
        store: arguments of `ObjectStore`.
        disk_dir: folder of the node's packs.
        disk_bytes: how much of it packs may fill.
        host_bytes: how much of the node's memory they may fill; 0: none.
        scratch: folder where packs of another version are made anew.
        base: the model that they are made for.
        logs: of the ranks' processes.
    """

    config: EngineConfig
    model: ModelSource
    store: dict[str, Any] = field(repr=False)
    disk_dir: Path
    disk_bytes: int
    host_bytes: int
    scratch: Path
    base: BaseModel
    logs: LogConfig = field(default_factory=LogConfig)

    def build(self, rendezvous: str) -> EngineLike:
        from ..workers import Engine

        configure_logs(self.logs, "engine")
        return Engine(self._config(rendezvous), self._packs())

    def _packs(self) -> PackSource:
        """Memory over disk over the object store."""
        from ..adapter_store import DiskTier, HostTier, ObjectStore, Repacker, host_folder

        store = ObjectStore(**self.store)
        remake = Repacker(store, self.base, self.scratch)
        disk = DiskTier(self.disk_dir, store, self.disk_bytes, remake=remake)
        if not self.host_bytes:
            return disk
        tier = HostTier(disk, self.host_bytes, host_folder(self.disk_dir))
        # A rank that is killed leaves its share of the memory to the node's next one.
        atexit.register(tier.close)
        return tier

    def follow(self, rank: int, rendezvous: str) -> None:
        from ..workers import run_follower

        configure_logs(self.logs, "engine")
        run_follower(self._config(rendezvous), rank)

    def _config(self, rendezvous: str) -> EngineConfig:
        return replace(self.config, rendezvous=rendezvous, model_path=str(self.model.folder()))


def rank_program(settings: Settings, base: BaseModel, threads: int) -> RankProgram:
    """
    Args:
        settings: with the model and a device other than "auto".
        base: that model.
        threads: of torch in one rank.

    Raises:
        SettingsError: the model or the device is still open.
        AdapterStoreError: the model isn't there.
    """
    from ..workers import EngineConfig

    if settings.device == "auto":
        raise SettingsError("the device must be settled before the groups start")
    model = model_source(settings)
    values: dict[str, Any] = {}
    if settings.max_context is not None:
        values["max_model_len"] = settings.max_context
    config = EngineConfig(
        model_path=str(model.folder()),
        load_format=settings.load_format,
        dtype=dtype_of(settings),
        device=settings.device,
        tp_size=settings.tp,
        ep_size=settings.ep,
        kv_tokens=settings.group_kv_tokens,
        max_batch_tokens=settings.max_batch_tokens,
        max_running=settings.max_running,
        pool_bytes=settings.rank_pool_bytes,
        memory_fraction=settings.memory_fraction,
        adapter_fraction=settings.adapter_fraction,
        max_lora_rank=settings.max_lora_rank,
        base_fingerprint=base.fingerprint,
        torch_threads=threads,
        **values,
    )
    return RankProgram(
        config,
        model,
        settings.store_options(),
        settings.disk_dir,
        disk_bytes=settings.disk_cache_bytes,
        host_bytes=settings.host_cache_bytes,
        scratch=settings.scratch_dir,
        base=base,
        logs=settings.logs,
    )


def dtype_of(settings: Settings) -> str:
    """The numbers that a rank computes in."""
    if settings.dtype != "auto":
        return settings.dtype
    if settings.device != "cuda":
        return "float32"
    return _checkpoint_dtype(model_source(settings).folder()) or "bfloat16"


def _checkpoint_dtype(folder: Path) -> str | None:
    """What config.json says of the weights' numbers; None when it says nothing that is served."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None  # whoever loads the model says what is wrong with it
    for name in ("dtype", "torch_dtype"):  # the second is what transformers 4 wrote
        value = str(config.get(name)).removeprefix("torch.")
        if value in DTYPE_BYTES:
            return value
    return None
