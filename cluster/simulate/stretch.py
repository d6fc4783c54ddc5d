"""Steps of a simulated group between two changes."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Stretch:
    """Equal steps, one after the other."""

    start_s: float
    steps: int
    seconds: float  # of one step
    prompt_tokens: int

    @property
    def end_s(self) -> float:
        return self.start_s + self.steps * self.seconds

    def whole_steps(self, now_s: float) -> int:
        return min(self.steps, math.floor((now_s - self.start_s) / self.seconds))

    def cut(self, now_s: float) -> Stretch:
        """The same, ending with the step that runs at `now_s`."""
        steps = min(self.steps, max(1, math.ceil((now_s - self.start_s) / self.seconds)))
        return Stretch(self.start_s, steps, self.seconds, self.prompt_tokens)
