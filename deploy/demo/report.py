"""Held-out perplexity of every style under the base and every adapter, and its README table."""

from __future__ import annotations

import math
from pathlib import Path

from corpus import TokenStream
from loop import mean_loss
from torch import nn

_BEGIN, _END = "<!-- perplexity:begin -->", "<!-- perplexity:end -->"


def perplexities(
    model: nn.Module, heldout: dict[str, TokenStream], batch: int, length: int, max_tokens: int
) -> dict[str, float]:
    """Perplexity per token of each style's held-out documents, by style."""
    return {
        style: math.exp(mean_loss(model, stream, batch, length, max_tokens))
        for style, stream in heldout.items()
    }


def markdown_table(results: dict[str, dict[str, float]], own: dict[str, str]) -> str:
    """One row a model, one column a style; an adapter's own style in bold.

    Args:
        results: model name -> style -> perplexity.
        own: model name -> its own style.
    """
    styles = list(next(iter(results.values())))
    rows = [["", *styles], ["---", *("---:" for _ in styles)]]
    for model, row in results.items():
        cells = [f"**{row[s]:.1f}**" if own.get(model) == s else f"{row[s]:.1f}" for s in styles]
        rows.append([model, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_into_readme(readme: Path, table: str) -> None:
    """Replaces what stands between the perplexity markers.

    Raises:
        ValueError: the markers are missing.
    """
    text = readme.read_text()
    if _BEGIN not in text or _END not in text:
        raise ValueError(f"{readme}: no {_BEGIN} ... {_END}")
    head, rest = text.split(_BEGIN, 1)
    tail = rest.split(_END, 1)[1]
    readme.write_text(f"{head}{_BEGIN}\n{table}\n{_END}{tail}")
