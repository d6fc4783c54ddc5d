"""How what came from outside stands in a message: as it was given, on one line, and bounded."""

from __future__ import annotations

_MAX_CHARS = 200


def printable(text: str) -> str:
    """The text with what can't be printed escaped, cut after 200 characters."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:_MAX_CHARS])
    return shown if len(text) <= _MAX_CHARS else f"{shown}..."


def show(value: object) -> str:
    """A text in single quotes, whatever quotes it holds; any other value as Python writes it."""
    return f"'{printable(value)}'" if isinstance(value, str) else printable(ascii(value))


def safe_key(name: str) -> str:
    """A tensor's name as it may travel in an error: unchanged when plain, else escaped and cut."""
    plain = name.isascii() and name.isprintable() and len(name) <= _MAX_CHARS
    return name if plain else show(name)
