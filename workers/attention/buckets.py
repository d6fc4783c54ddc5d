"""Sizes that shapes are rounded up to, so that few of them occur."""

from __future__ import annotations


def pow2(n: int) -> int:
    """The least power of two that isn't below n; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()
