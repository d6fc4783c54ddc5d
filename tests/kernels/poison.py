"""Memory that was never written shows: fresh tensors hold NaN, or numbers that mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

_empty, _new_empty = torch.empty, torch.Tensor.new_empty


def _spoil(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    # Small, so that what takes one for an index reads nonsense rather than other memory's pages.
    nonsense = torch.arange(tensor.numel(), device=tensor.device) % 13 - 5
    return tensor.copy_(nonsense.view(tensor.shape))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it, `torch.empty` and `Tensor.new_empty` return spoilt tensors."""
    with (
        mock.patch.object(torch, "empty", lambda *a, **k: _spoil(_empty(*a, **k))),
        mock.patch.object(torch.Tensor, "new_empty", lambda *a, **k: _spoil(_new_empty(*a, **k))),
    ):
        yield
