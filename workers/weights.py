"""Reads a rank's slices of a Hugging Face checkpoint (one or many safetensors files)."""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch

from .errors import ModelFilesInvalid
from .safetensors_file import SafetensorsFile

_SCRATCH_BYTES = 32 << 20  # for one thread; an expert's projection has a few MB


class TensorSource(ABC):
    """Where the loader takes a rank's weights from. Several threads may call `get`."""

    dtype: torch.dtype  # the model's
    device: str

    @abstractmethod
    def __contains__(self, name: str, /) -> bool: ...

    def get(
        self,
        name: str,
        shape: Sequence[int],
        rows: slice | None = None,
        cols: slice | None = None,
        depth: slice | None = None,
        into: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """The tensor `name`, cut to `rows`, `cols` and `depth` of its first three dimensions.

        Args:
            shape: of the whole tensor, as config.json has it.
            into: where to put it; None: a new, contiguous tensor on the rank's device.
            dtype: of that one; None: the model's. One of whole numbers or of one byte, here or in
                the checkpoint, must be the other's: codes of quantised weights mean nothing in
                another.

        Returns:
            What `into` is, or the new tensor.

        Raises:
            ModelFilesInvalid: there is no such tensor, or it has another shape or such a dtype.
        """
        wanted = into.dtype if into is not None else dtype or self.dtype
        return self.read(name, shape, whole_slices(shape, rows, cols, depth), into, wanted)

    @abstractmethod
    def read(
        self,
        name: str,
        shape: Sequence[int],
        slices: tuple[slice, ...],
        into: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """`get` of slices with start and end, one for each dimension; `into`, if given, is of
        `dtype`."""


class Checkpoint(TensorSource):
    """Opened shards of a model folder, addressed by tensor name. Use as a context manager."""

    def __init__(self, folder: str | Path, dtype: torch.dtype, device: str):
        self._folder = Path(folder)
        self.dtype, self.device = dtype, device
        self._file_of: dict[str, SafetensorsFile] = {}
        self._open: list[SafetensorsFile] = []
        self._lock = threading.Lock()
        self._local = threading.local()
        self.read_bytes = 0  # of the slices that were asked for, as they are in the files

    def __enter__(self) -> Checkpoint:
        for path in self._shards():
            file = SafetensorsFile(path)
            self._open.append(file)
            self._file_of.update(dict.fromkeys(file.tensors, file))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        for file in self._open:
            file.close()
        self._open.clear()
        self._file_of.clear()

    def _shards(self) -> list[Path]:
        index = self._folder / "model.safetensors.index.json"
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            shards = [self._folder / n for n in names]
        else:
            shards = sorted(self._folder.glob("*.safetensors"))
        missing = [str(p) for p in shards if not p.exists()]
        if missing or not shards:
            what = ", ".join(missing) or f"{self._folder}/*.safetensors"
            raise ModelFilesInvalid(f"model weights are missing: {what}")
        return shards

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(
        self,
        name: str,
        shape: Sequence[int],
        slices: tuple[slice, ...],
        into: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        if name not in self._file_of:
            raise ModelFilesInvalid(f"{self._folder}: no shard holds the tensor {name!r}")
        file = self._file_of[name]
        found = file.tensors[name].shape
        if found != tuple(shape):
            raise ModelFilesInvalid(
                f"{self._folder}: the tensor {name!r} has shape {list(found)}, config.json "
                f"says {list(shape)}"
            )
        stored = file.tensors[name].dtype
        codes = not dtype.is_floating_point or 1 in (dtype.itemsize, stored.itemsize)
        if codes and stored != dtype:
            raise ModelFilesInvalid(
                f"{self._folder}: the tensor {name!r} is of {stored}, {dtype} is needed"
            )
        part = file.read(name, slices, self._scratch)
        with self._lock:
            self.read_bytes += part.nbytes
        out = into
        if out is None:
            out = torch.empty(part.shape, dtype=dtype, device=self.device)
        return out.copy_(part)

    def _scratch(self, nbytes: int) -> torch.Tensor:
        """Memory of this thread, which its next read takes again: fresh memory costs page faults,
        and a GPU copies from pinned memory alone at full rate."""
        if nbytes > _SCRATCH_BYTES:
            return torch.empty(nbytes, dtype=torch.uint8)
        if not hasattr(self._local, "scratch"):
            pin = torch.device(self.device).type == "cuda"
            self._local.scratch = torch.empty(_SCRATCH_BYTES, dtype=torch.uint8, pin_memory=pin)
        return self._local.scratch[:nbytes]


def whole_slices(shape: Sequence[int], *cuts: slice | None) -> tuple[slice, ...]:
    """One slice with start and end for each dimension of `shape`; all of it where none is given."""
    given = (*cuts, *(None,) * len(shape))
    return tuple(
        slice(0, n) if cut is None else slice(*cut.indices(n)[:2])
        for n, cut in zip(shape, given, strict=False)
    )
