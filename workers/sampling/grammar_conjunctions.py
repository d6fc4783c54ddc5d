"""Bounds on how many patterns of one grammar apply to the same text at once.

llguidance multiplies such patterns out, in steps that its fuel doesn't count: twenty of them, in a
few hundred bytes, keep a thread busy for minutes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import GrammarInvalid

_MAX_ANDS = 12  # of Lark's `&`; 20 still take milliseconds, 22 minutes
_MAX_PATTERNS = 8  # of JSON schemas that apply together; each takes more than twice as long
_TOGETHER = {"allOf", "$ref", "anyOf", "oneOf"}  # apply beside what stands next to them


def check_conjunctions(text: str, *, lark: bool) -> None:
    """
    Args:
        lark: it is in Lark, which may hold JSON schemas; else it is a JSON schema.

    Raises:
        GrammarInvalid: too many patterns apply together.
    """
    if lark and (ands := text.count("&")) > _MAX_ANDS:
        raise GrammarInvalid(
            f"& is written {ands} times, at most {_MAX_ANDS} are allowed; "
            "in texts and regular expressions write \\x26"
        )
    for schema in _schemas_in(text.split("%json")[1:] if lark else [text]):
        count = _Together(schema).patterns()
        if count > _MAX_PATTERNS:
            raise GrammarInvalid(
                f"{count} times pattern or format may apply to one text, by allOf and $ref; at "
                f"most {_MAX_PATTERNS} are allowed"
            )


def _schemas_in(parts: Iterable[str]) -> Iterator[Any]:
    """What the parts begin with; llguidance refuses what isn't JSON."""
    decoder = json.JSONDecoder(parse_int=float)  # Python refuses an integer of 5,000 digits
    for part in parts:
        with contextlib.suppress(ValueError):
            yield decoder.raw_decode(part.lstrip())[0]


class _Together:
    """Counts, for one schema, the patterns that may apply to one text; rather too many than few."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._known: dict[str, int] = {}  # by reference; 0 while it is looked at

    def patterns(self) -> int:
        return self._of(self._root)

    def _of(self, node: Any) -> int:
        if isinstance(node, list):
            return max(map(self._of, node), default=0)
        if not isinstance(node, dict):
            return 0
        own = sum(isinstance(node.get(name), str) for name in ("pattern", "format"))
        inner = [self._of(value) for name, value in node.items() if name not in _TOGETHER]
        every, ref = node.get("allOf"), node.get("$ref")
        return (
            max([own, *inner])
            + (sum(map(self._of, every)) if isinstance(every, list) else self._of(every))
            + (self._of_reference(ref) if isinstance(ref, str) else self._of(ref))
            + self._of(node.get("anyOf"))
            + self._of(node.get("oneOf"))
        )

    def _of_reference(self, reference: str) -> int:
        if reference not in self._known:
            self._known[reference] = 0
            self._known[reference] = self._of(self._find(reference))
        return self._known[reference]

    def _find(self, reference: str) -> Any:
        """The schema that a JSON pointer names; the root, which holds it, for other names."""
        found = self._root
        for part in reference.removeprefix("#").split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, dict) and name in found:
                found = found[name]
            else:
                return self._root
        return found
