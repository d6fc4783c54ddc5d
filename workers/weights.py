"""Reads a rank's slices of a Hugging Face checkpoint (one or many safetensors files)."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import ModelFilesInvalid


class Checkpoint:
    """Opened shards of a model folder, addressed by tensor name. Use as a context manager."""

    def __init__(self, folder: str | Path, dtype: torch.dtype, device: str):
        self._folder = Path(folder)
        self.dtype, self.device = dtype, device
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
        rows: slice | None = None,
        cols: slice | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """The tensor `name`, cut to `rows` of dim 0 and `cols` of dim 1, in the model's dtype or in
        `dtype`.

        Raises:
            ModelFilesInvalid: no shard holds that name.
        """
        return self._read(name, rows, cols).to(device=self.device, dtype=dtype or self.dtype)

    def stored(
        self, name: str, rows: slice | None = None, cols: slice | None = None
    ) -> torch.Tensor:
        """As `get`, but in the dtype of the file: quantised weights mean nothing in another."""
        return self._read(name, rows, cols).to(self.device)

    def _read(self, name: str, rows: slice | None, cols: slice | None) -> torch.Tensor:
        if name not in self._file_of:
            raise ModelFilesInvalid(f"{self._folder}: no shard holds the tensor {name!r}")
        view = self._file_of[name].get_slice(name)
        if rows is None and cols is None:
            return view[:]
        if cols is None:
            return view[rows]
        return view[rows or slice(None), cols]
