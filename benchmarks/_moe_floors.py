"""The least time that an MoE layer can take: its bytes and its FLOPs at the measured ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _moe_inputs import Routing, Shape

_ELEMENT = 2  # bytes, bf16
_COPIES = 10
_PRODUCTS = 20


@dataclass(frozen=True)
class Ceilings:
    copy_bytes_s: float  # read + written
    matmul_flop_s: float

    @classmethod
    def measured(
        cls, device: torch.device, seconds_of: Callable[[Callable[[], object]], float], small: bool
    ) -> Ceilings:
        """Medians of a large copy within the device and of a large bf16 matrix product.

        Args:
            seconds_of: time of one call.
            small: sizes for a check of this program rather than of the machine.
        """
        size = 2**20 if small else 2**31  # elements; 4 GB
        source = torch.empty(size, dtype=torch.bfloat16, device=device).normal_()
        target = torch.empty_like(source)
        seconds_of(lambda: target.copy_(source))  # warm-up
        copies = [seconds_of(lambda: target.copy_(source)) for _ in range(_COPIES)]
        side = 128 if small else 8192
        a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
        for _ in range(3):
            seconds_of(lambda: a @ b)
        products = [seconds_of(lambda: a @ b) for _ in range(_PRODUCTS)]
        return cls(
            2 * source.nbytes / statistics.median(copies),
            2 * side**3 / statistics.median(products),
        )

    def us(self, moved_bytes: float, flop: float) -> float:
        return 1e6 * max(moved_bytes / self.copy_bytes_s, flop / self.matmul_flop_s)

    def __str__(self) -> str:
        return (
            f"{self.copy_bytes_s / 1e12:.2f} TB/s copied (read + written), "
            f"{self.matmul_flop_s / 1e12:.0f} TFLOP/s in a bf16 product"
        )


def layer_floors_us(
    shape: Shape, routing: Routing, rank: int, ceilings: Ceilings
) -> tuple[float, float]:
    """Floors of one layer without and with its adapters, each token having one.

    Bytes: weights of the experts that are chosen, x and the routing read and the output written
    once; with LoRA also the factors of each (slot, expert) that a pair meets. Intermediates are
    not counted: a kernel could keep them on the chip.
    """
    ids = routing.ids
    tokens = ids.shape[0]
    here = ids >= 0
    pairs = int(here.sum())
    experts = ids[here].unique().numel()
    rows_read = int(here.any(1).sum())
    moved = experts * shape.expert_bytes(_ELEMENT)
    moved += _ELEMENT * (rows_read + tokens) * shape.hidden
    moved += ids.nbytes + routing.weights.nbytes
    flop = 2 * pairs * shape.expert_elements

    pages = (routing.slot.long().unsqueeze(1) * shape.experts + ids)[here].unique().numel()
    factors = sum(shape.factor_elements(rank))
    lora_moved = moved + _ELEMENT * pages * factors + routing.slot.nbytes
    lora_flop = flop + 2 * pairs * factors
    return ceilings.us(moved, flop), ceilings.us(lora_moved, lora_flop)
