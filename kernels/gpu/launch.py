"""How kernels are launched: programmatic dependent launch, and the few sizes it depends on.

With programmatic dependent launch a kernel starts while the one before it still runs, and waits
where it first needs what that one wrote. Every program of every kernel here waits, so that
"my predecessor is done" implies the same of all kernels before it.
"""

from __future__ import annotations

import torch
import triton
import triton.knobs
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def _can_use_pdl() -> bool:
    if triton.knobs.runtime.interpret or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability()[0] >= 9


USE_PDL = _can_use_pdl()


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Wait until the kernel before this one is done and its writes can be seen."""
    if PDL:
        gdc_wait()


@triton.jit
def pdl_launch_dependents(PDL: tl.constexpr):
    """Let the next kernel start once every program of this one has come here or ended."""
    if PDL:
        gdc_launch_dependents()


def cdiv(n: int, size: int) -> int:
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
