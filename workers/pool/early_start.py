"""Whether a prompt may start before its adapter has come whole. Pure, but for what was measured.

Layer by layer the copy runs ahead of compute, or compute stands still on the device, and with it
everybody else's step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_WEIGHT = 0.3  # of the newest measurement
_MARGIN = 1.1  # that a copy may take longer than was measured
# Shorter steps take their launches' time, which says little of a token's.
_LEAST_TOKENS = 64


def stays_ahead(
    layers: Sequence[tuple[int, int]], bytes_s: float, layer_s: float, elapsed_s: float = 0.0
) -> bool:
    """Whether each layer arrives before compute that begins with the first one comes to it.

    Args:
        layers: (index in the model, bytes) in the order in which they come; not empty.
        bytes_s: of the copy. layer_s: of compute, per layer of the model.
        elapsed_s: since the copy began.
    """
    arrival, begin = -elapsed_s, 0.0
    for nth, (index, nbytes) in enumerate(layers):
        arrival += _MARGIN * nbytes / bytes_s
        if nth == 0:
            begin = max(arrival, 0.0) - index * layer_s
        if arrival > begin + index * layer_s + 1e-9:
            return False
    return True


@dataclass
class Speeds:
    """Running means of what was measured; 0: nothing was."""

    copy_bytes_s: float = 0.0  # of loads from pinned memory
    prefill_token_s: float = 0.0  # of one token, through all layers

    def loaded(self, nbytes: int, seconds: float) -> None:
        if nbytes and seconds > 0:
            self.copy_bytes_s = _mean(self.copy_bytes_s, nbytes / seconds)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """A step of so many new tokens that waited for no load."""
        if tokens >= _LEAST_TOKENS and seconds > 0:
            self.prefill_token_s = _mean(self.prefill_token_s, seconds / tokens)

    def may_start(
        self,
        layers: Sequence[tuple[int, int]],
        tokens: int,
        model_layers: int,
        elapsed_s: float,
    ) -> bool:
        """Whether the prefill of so many tokens may begin now."""
        if not (layers and tokens and self.copy_bytes_s and self.prefill_token_s):
            return False
        layer_s = tokens * self.prefill_token_s / model_layers
        return stays_ahead(layers, self.copy_bytes_s, layer_s, elapsed_s)


def _mean(before: float, now: float) -> float:
    return now if before == 0 else (1 - _WEIGHT) * before + _WEIGHT * now
