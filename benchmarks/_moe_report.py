"""Lines of benchmarks/moe_lora.py's tables, and the bars that its figures are held against."""

from __future__ import annotations

import statistics
from typing import Any

from _moe_inputs import MAIN_SHAPE, RANK

# What is to be reached on one H100 by MAIN_SHAPE, whole, at rank 16.
BASE_BARS = {8: 0.94, 32: 0.98, 64: 0.98, 8192: 0.60}  # tokens: floor / base, at least
ALIGN_BARS_US = {64: 4.0, 8192: 25.0}
LORA_BARS = {  # (tokens, adapters): figure, at most
    (1, 1): ("LoRA/base", 1.25),
    (8, 8): ("LoRA/floor", 1.10),
    **{(32, n): ("LoRA/floor", 1.07) for n in (1, 8, 32)},
    **{(64, n): ("LoRA/floor", 1.07) for n in (1, 8, 32, 64)},
    **{(256, n): ("LoRA/floor", 1.10) for n in (1, 64)},
    (8192, 1): ("LoRA/base", 1.09),
    (8192, 8): ("LoRA/base", 1.15),
    (8192, 64): ("LoRA us", 1950.0),
}
HEADING = (
    "tokens adapters rank  slots |  base us (floor     %) |  LoRA us (floor     x) "
    "| LoRA/base (floor) | bars"
)


def bars_of(row: dict[str, Any]) -> dict[str, bool]:
    """Each bar that the row has, and whether it is met."""
    if row["shape"] != MAIN_SHAPE or row["parallel"] != "none" or row["rank"] != RANK:
        return {}
    if row["fp8"]:
        return {}
    bars = {}
    if (least := BASE_BARS.get(row["tokens"])) is not None:
        bars[f"floor/base >= {least:.2f}"] = row["base_floor_us"] >= least * row["base_us"]
    if bar := LORA_BARS.get((row["tokens"], row["adapters"])):
        figure, most = bar
        lora = row["lora_us"]
        value = {"LoRA us": lora, "LoRA/base": lora / row["base_us"],
                 "LoRA/floor": lora / row["lora_floor_us"]}[figure]  # fmt: skip
        bars[f"{figure} <= {most:g}"] = value <= most
    return bars


def line_of(row: dict[str, Any]) -> str:
    base, lora = row["base_us"], row["lora_us"]
    base_floor, lora_floor = row["base_floor_us"], row["lora_floor_us"]
    return (
        f"{row['tokens']:6} {row['adapters']:8} {row['rank']:4} {row['slots']:6} | "
        f"{base:8.1f} ({base_floor:5.0f} {100 * base_floor / base:5.1f}) | "
        f"{lora:8.1f} ({lora_floor:5.0f} {lora / lora_floor:5.2f}) | "
        f"{lora / base:9.2f} ({lora_floor / base_floor:5.2f}) | {bars_text(row['bars'])}"
    )


def align_bars_of(shape: str, tokens: int, us: float) -> dict[str, bool]:
    if shape != MAIN_SHAPE:
        return {}
    return {f"us < {ALIGN_BARS_US[tokens]:g}": us < ALIGN_BARS_US[tokens]}


def bars_text(bars: dict[str, bool]) -> str:
    return ", ".join(f"{bar} {'pass' if met else 'MISS'}" for bar, met in bars.items())


def print_slot_costs(rows: list[dict[str, Any]]) -> None:
    """How much longer rows take with other numbers of slots than with the one measured first."""
    first: dict[tuple[Any, ...], float] = {}
    ratios: dict[int, list[float]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("shape", "parallel", "tokens", "adapters"))
        if key in first:
            ratios.setdefault(row["slots"], []).append(row["lora_us"] / first[key])
        else:
            first[key] = row["lora_us"]
    for slots, found in ratios.items():
        print(
            f"\n{slots} slots, against the same rows with the first number of slots: "
            f"{statistics.median(found):.3f} times as long (median of {len(found)} rows), "
            f"{max(found):.3f} at most"
        )
