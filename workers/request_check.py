"""What a request may look like on the wire: types, and the ranges that the engine relies on.

Gateways check what their clients say; this is the check of gateways, so that no frame of theirs
can raise in the engine, which all requests share.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

_TENANT = re.compile(r"[A-Za-z0-9_-]{1,128}")  # it names a folder
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST = 1e9  # of a number: float32 sums with logits stay finite


def _integer(value: Any) -> bool:
    return type(value) is int


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= _MOST


def _ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and set(map(type, value)) <= {int}


def _bias(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and _integer(pair[0]) and _number(pair[1])
        for pair in value
    )


def _grammar(value: Any) -> bool:
    return value is None or (
        isinstance(value, list | tuple) and len(value) == 2 and set(map(type, value)) == {str}
    )


_Rule = tuple[str, Callable[[Any], bool]]
_OPTIONAL_COUNT: _Rule = ("null or an integer, 0 or more", lambda v: v is None or _count(v))
_LIST_OF_IDS: _Rule = ("a list of token ids", _ids)

_REQUEST: dict[str, _Rule] = {
    # An id comes back with every output; one that fills a frame would leave no room for any.
    "id": ("a text of at most 512 characters", lambda v: isinstance(v, str) and len(v) <= 512),
    "prompt": _LIST_OF_IDS,
    "output": _LIST_OF_IDS,
    "tenant": (
        "1 to 128 letters, digits, - or _",
        lambda v: isinstance(v, str) and bool(_TENANT.fullmatch(v)),
    ),
    "adapter": (
        "null or a sha256 as 64 lowercase hex digits",
        lambda v: v is None or (isinstance(v, str) and bool(_DIGEST.fullmatch(v))),
    ),
    "sampling": ("a map", lambda v: isinstance(v, Mapping)),
}
_OPTIONAL: dict[str, _Rule] = {
    "traceparent": (
        "a text of at most 128 characters",
        lambda v: isinstance(v, str) and len(v) <= 128,
    ),
}
_SAMPLING: dict[str, _Rule] = {
    "max_tokens": ("an integer, 0 or more", _count),
    "min_tokens": ("an integer, 0 or more", _count),
    "temperature": ("a number, 0 or more", lambda v: _number(v) and v >= 0),
    "top_p": ("a number above 0, at most 1", lambda v: _number(v) and 0 < v <= 1),
    "top_k": ("an integer, 0 or more", _count),
    "min_p": ("a number from 0 to 1", lambda v: _number(v) and 0 <= v <= 1),
    "repetition_penalty": ("a number above 0", lambda v: _number(v) and v > 0),
    "presence_penalty": ("a number", _number),
    "frequency_penalty": ("a number", _number),
    "logit_bias": ("a list of [token id, number]", _bias),
    "seed": ("an integer", _integer),
    "logprobs": _OPTIONAL_COUNT,
    "prompt_logprobs": _OPTIONAL_COUNT,
    "stop_token_ids": _LIST_OF_IDS,
    "ignore_eos": ("true or false", lambda v: isinstance(v, bool)),
    "grammar": ("null or [kind, text]", _grammar),
}


def check_request(msg: Mapping[str, Any]) -> None:
    """Checks the wire form of a `GenerationRequest`. Fields of `sampling` and a `traceparent` may
    be missing.

    Raises:
        ValueError: a field is missing, unknown or not what it must be; the message names it.
    """
    missing = _REQUEST.keys() - msg.keys()
    if missing:
        raise ValueError(f"{min(missing)!r} is missing")
    _check(msg, {**_REQUEST, **_OPTIONAL}, "")
    _check(msg["sampling"], _SAMPLING, "sampling.")


def _check(msg: Mapping[str, Any], rules: Mapping[str, _Rule], where: str) -> None:
    for name, value in msg.items():
        if name not in rules:
            raise ValueError(f"there is no field {where}{_shown(name)}")
        words, holds = rules[name]
        if not holds(value):
            raise ValueError(f"{where}{name} must be {words}, got {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
