"""A residual stream's addition and the norm behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .backends import gpu
from .checks import FLOAT_TYPES, check, check_contiguous


def add_rms_norm_(
    x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """x += y in place; then x normalised by its root mean square, in float32, and scaled.

    Args:
        x: [T, N].
        y: [T, N], or None for nothing to add.
        weight: [N].
        eps: added to the mean square.

    Returns:
        [T, N], of x's dtype.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or layout.
    """
    check("x", x, shape=(None, None), dtype=FLOAT_TYPES)
    check("weight", weight, shape=(x.shape[1],), dtype=FLOAT_TYPES, device=x.device)
    if y is not None:
        check("y", y, shape=tuple(x.shape), dtype=x.dtype, device=x.device)
    if x.device.type != "cpu":
        for name, tensor in (("x", x), ("y", y), ("weight", weight)):
            check_contiguous(name, tensor)
        return gpu().add_rms_norm_(x, y, weight, eps)
    if y is not None:
        x += y
    return F.rms_norm(x.float(), (x.shape[1],), weight.float(), eps).to(x.dtype)
