"""Stop strings: text ends before the first of them, also across the borders of tokens."""

from __future__ import annotations

from collections.abc import Sequence


class _Matcher:
    """One stop string's Knuth-Morris-Pratt automaton, fed a character at a time."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.matched = 0  # length of the longest prefix that the text ends with
        self._fall = [0] * len(pattern)  # the same length, for each prefix of the pattern itself
        length = 0
        for i in range(1, len(pattern)):
            while length and pattern[i] != pattern[length]:
                length = self._fall[length - 1]
            length += pattern[i] == pattern[length]
            self._fall[i] = length

    def feed(self, char: str) -> bool:
        """True when this character completes the pattern; nothing may be fed after that."""
        while self.matched and char != self.pattern[self.matched]:
            self.matched = self._fall[self.matched - 1]
        self.matched += char == self.pattern[self.matched]
        return self.matched == len(self.pattern)


class StopScanner:
    """Releases text that can't be part of a stop string any more, and holds the rest back.

    The stop string that is complete first ends the text; among several that are complete with
    the same character, the longest. So the result doesn't depend on how the text was cut up.

    Args:
        stops: non-empty strings; none: all text is released at once.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""
        self.stopped: str | None = None  # the stop string that ended the text

    def push(self, text: str) -> str:
        """The text that may leave now, which never contains a stop string or its beginning.

        After `stopped` is set, nothing more may be pushed.
        """
        if not self._matchers:
            return text
        buffer = self._held + text
        for i in range(len(self._held), len(buffer)):
            complete = [m.pattern for m in self._matchers if m.feed(buffer[i])]
            if complete:
                self.stopped = max(complete, key=len)
                self._held = ""
                return buffer[: i + 1 - len(self.stopped)]
        held = max(m.matched for m in self._matchers)
        self._held = buffer[len(buffer) - held :]
        return buffer[: len(buffer) - held]

    def finish(self) -> str:
        """What was held back, now that no text follows."""
        held, self._held = self._held, ""
        return held
