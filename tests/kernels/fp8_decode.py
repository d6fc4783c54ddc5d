"""FP8's decoding as a kernel of its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from loraplex.kernels import FP8
from loraplex.kernels.gpu.fp8 import decode

from .fp8 import e4m3


@triton.jit
def _decode_kernel(codes, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, decode(tl.load(codes + i), out.dtype.element_ty))


def assert_every_code_is_decoded(dtype: torch.dtype, device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(FP8)
    out = torch.empty(256, dtype=dtype, device=device)
    _decode_kernel[(1,)](codes, out, tl.constexpr(256))
    want = torch.tensor([e4m3(code) for code in range(256)])
    assert torch.equal(out.cpu().float().nan_to_num(1e9), want.nan_to_num(1e9))
