"""Argument checks: Python-level reads of shape, dtype and device, once per call."""

from __future__ import annotations

import torch

INTEGER_TYPES = (torch.int32, torch.int64)
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(
    name: str,
    tensor: torch.Tensor,
    *,
    shape: tuple[int | None, ...],
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise ValueError, naming the argument, unless `tensor` is as said (None = any size)."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    actual = tensor.shape
    fits = len(actual) == len(shape)
    if fits:
        for got, want in zip(actual, shape, strict=True):
            if want is not None and got != want:
                fits = False
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(actual)}")
    if dtype is not None:
        allowed = dtype if isinstance(dtype, tuple) else (dtype,)
        if tensor.dtype not in allowed:
            wanted = " or ".join(str(item) for item in allowed)
            raise ValueError(f"{name} must be {wanted}, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def check_contiguous(name: str, tensor: torch.Tensor | None) -> None:
    """Raise ValueError, naming the argument, where kernels would misread it or copy it."""
    if tensor is not None and not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got strides {list(tensor.stride())} for shape "
            f"{list(tensor.shape)}"
        )


def check_topk_ids(topk_ids: torch.Tensor, num_experts: int) -> None:
    """Shape and dtype; on CPU also that every id is below `num_experts`."""
    check("topk_ids", topk_ids, shape=(None, None), dtype=INTEGER_TYPES)
    if topk_ids.device.type == "cpu" and topk_ids.numel():
        largest = int(topk_ids.max())
        if largest >= num_experts:
            raise ValueError(f"topk_ids must be below num_experts = {num_experts}, got {largest}")


def check_token_slot(token_slot: torch.Tensor, num_tokens: int, device: torch.device) -> None:
    check("token_slot", token_slot, shape=(num_tokens,), dtype=INTEGER_TYPES, device=device)
