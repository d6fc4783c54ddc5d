"""Which backend runs on a device."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from .runner import MoeBackend
from .torch_backend import TorchBackend

_TORCH = TorchBackend()


@cache
def gpu() -> ModuleType:
    """The Triton kernels. Loaded where a GPU asks for them: a process on CPUs needs no Triton."""
    return import_module("..gpu", __name__)


def backend_for(device: torch.device) -> MoeBackend:
    """The fastest backend of a device."""
    return _TORCH if device.type == "cpu" else gpu().FUSED
