"""Tables and segments as numpy arrays: the torch backend plans its products on the host."""

from __future__ import annotations

import numpy as np
import torch


def on_host(tensor: torch.Tensor) -> np.ndarray:
    """The same memory on CPU; a copy, and a wait for it, from another device."""
    return tensor.cpu().numpy()
