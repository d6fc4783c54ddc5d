"""Layers whose base weights are FP8."""

from __future__ import annotations

from dataclasses import replace

import torch
from loraplex.kernels import FP8, fp8_blocks

from .cases import Layer, random_layer


def e4m3(code: int) -> float:
    """By the format: a sign, four bits of exponent with bias 7, three of mantissa; exponent 0 is
    subnormal; all ones are no number."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
    return -size if sign else size


def random_codes(seed: int, *shape: int) -> torch.Tensor:
    """Of all numbers that e4m3 has, each as likely."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 254, shape, dtype=torch.uint8, generator=generator)
    return (codes + (codes >= 127).to(torch.uint8)).view(FP8)  # without the two codes of NaN


def fp8_layer(seed: int, tokens: int, **options) -> Layer:
    """A random layer with weights of any codes. Scales differ by up to sixteen times, and are such
    that weights are about as large as in `random_layer`."""
    layer = random_layer(seed, tokens, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    quantised = {}
    for nth, name in enumerate(("w13", "w2")):
        experts, rows, columns = getattr(layer, name).shape
        codes = random_codes(seed + nth, experts, rows, columns)
        size = 1 / (codes.float().std() * columns**0.5)
        blocks = (experts, fp8_blocks(rows), fp8_blocks(columns))
        scale = size * 4 ** (2 * torch.rand(blocks, generator=generator) - 1)
        quantised |= {name: codes, f"{name}_scale": scale}
    return replace(layer, **quantised)
