"""How long a request that comes now would wait for its first token, from what steps took lately."""

from __future__ import annotations

_NEW = 0.1  # weight of the newest step in the averages


class Pace:
    """Moving averages over an engine's steps. Pure: seconds and counts are passed in.

    `step_s`: seconds of a step that only decodes. `token_s`: seconds that a prompt token adds to
    a step. `end_s`: seconds between two ends of requests. All are 0 until something was seen.
    """

    def __init__(self) -> None:
        self.step_s = 0.0
        self.token_s = 0.0
        self.end_s = 0.0
        self._since_end_s = 0.0

    def stepped(self, seconds: float, prompt_tokens: int, ended: int) -> None:
        """Takes one step: its length, its prompt tokens, and how many requests ended by it."""
        if prompt_tokens:
            added = max(0.0, seconds - self.step_s) / prompt_tokens
            self.token_s = _mean(self.token_s, added)
        else:
            self.step_s = _mean(self.step_s, seconds)
        self._since_end_s += seconds
        if ended:
            self.end_s = _mean(self.end_s, self._since_end_s / ended)
            self._since_end_s = 0.0

    @property
    def ends_every_s(self) -> float:
        """`end_s`, or more when nothing has ended for longer."""
        return max(self.end_s, self._since_end_s)

    def wait_s(self, prompt_tokens: float, queued: float, free_rows: int) -> float:
        """Seconds until a new request's own prompt is begun.

        Args:
            prompt_tokens: that are computed before it.
            queued: requests that start before it.
            free_rows: how many more the engine would decode together.
        """
        ends_needed = max(0, queued + 1 - free_rows)
        return self.step_s + prompt_tokens * self.token_s + ends_needed * self.end_s


def _mean(old: float, new: float) -> float:
    return old + _NEW * (new - old) if old else new
