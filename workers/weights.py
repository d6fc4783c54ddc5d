"""Reads a rank's slices of a Hugging Face checkpoint (one or many safetensors files)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from .errors import ModelFilesInvalid


class TensorSource(Protocol):
    """Where the loader takes a rank's weights from."""

    def __contains__(self, name: str, /) -> bool: ...

    def get(
        self,
        name: str,
        shape: Sequence[int],
        rows: slice | None = None,
        cols: slice | None = None,
        depth: slice | None = None,
    ) -> torch.Tensor:
        """The tensor `name`, cut to `rows`, `cols` and `depth` of its first three dimensions.

        Args:
            shape: of the whole tensor, as config.json has it.

        Returns:
            A contiguous tensor on the rank's device, in the model's dtype.

        Raises:
            ModelFilesInvalid: there is no such tensor, or it has another shape.
        """
        ...


class Checkpoint:
    """Opened shards of a model folder, addressed by tensor name. Use as a context manager."""

    def __init__(self, folder: str | Path, dtype: torch.dtype, device: str):
        self._folder = Path(folder)
        self._dtype, self._device = dtype, device
        self._file_of: dict[str, Any] = {}
        self._open: list[Any] = []

    def __enter__(self) -> Checkpoint:
        for path in self._shards():
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as e:
                raise ModelFilesInvalid(f"{path} can't be read as safetensors: {e}") from None
            self._open.append(handle)
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                self._file_of[name] = handle
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
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

    def get(
        self,
        name: str,
        shape: Sequence[int],
        rows: slice | None = None,
        cols: slice | None = None,
        depth: slice | None = None,
    ) -> torch.Tensor:
        """See TensorSource."""
        if name not in self._file_of:
            raise ModelFilesInvalid(f"{self._folder}: no shard holds the tensor {name!r}")
        view = self._file_of[name].get_slice(name)
        if view.get_shape() != list(shape):
            raise ModelFilesInvalid(
                f"{self._folder}: the tensor {name!r} has shape {view.get_shape()}, config.json "
                f"says {list(shape)}"
            )
        out = view[whole_slices(shape, rows, cols, depth)]
        return out.to(device=self._device, dtype=self._dtype).contiguous()


def whole_slices(shape: Sequence[int], *cuts: slice | None) -> tuple[slice, ...]:
    """One slice with start and end for each dimension of `shape`; all of it where none is given."""
    given = (*cuts, *(None,) * len(shape))
    return tuple(
        slice(0, n) if cut is None else slice(*cut.indices(n)[:2])
        for n, cut in zip(shape, given, strict=False)
    )
