"""Checks that factors of every format share, and the refusals that they end in."""

from __future__ import annotations

from .config_fields import MAX_RANK
from .errors import AdapterRefused
from .quoting import safe_key, show
from .safetensors_header import TensorInfo

Pair = tuple[TensorInfo, TensorInfo]  # A, B


def check_pair(pair: Pair, rank: int, in_: int, out: int) -> None:
    """Checks A [rank, in_] and B [out, rank].

    Raises:
        AdapterRefused: "rank_limit" or "wrong_shape".
    """
    check_rank(pair, rank)
    for info, side, shape in ((pair[0], "A", (rank, in_)), (pair[1], "B", (out, rank))):
        if info.shape != shape:
            raise wrong_shape(info, f"{list(shape)} (lora_{side} at the configured rank {rank})")


def check_rank(pair: Pair, rank: int) -> None:
    """Raises: AdapterRefused ("rank_limit")."""
    if not 1 <= rank <= MAX_RANK:
        raise AdapterRefused(
            "rank_limit",
            f"tensor {show(pair[0].name)} has rank {rank}, it must be 1 to {MAX_RANK}",
            safe_key(pair[0].name),
        )


def wrong_shape(info: TensorInfo, expected: str) -> AdapterRefused:
    return AdapterRefused(
        "wrong_shape",
        f"tensor {show(info.name)} has shape {list(info.shape)}, expected {expected}",
        safe_key(info.name),
    )


def not_targeted(info: TensorInfo, module: str) -> AdapterRefused:
    return AdapterRefused(
        "not_targeted",
        f"tensor {show(info.name)}: adapter_config.json doesn't target {module}, so PEFT would "
        "ignore it; check target_modules, target_parameters, exclude_modules and "
        "layers_to_transform",
        safe_key(info.name),
    )


def duplicate(info: TensorInfo, other: str) -> AdapterRefused:
    return AdapterRefused(
        "duplicate_key",
        f"tensor {show(info.name)} stands for the same factor as {show(other)}",
        safe_key(info.name),
    )
