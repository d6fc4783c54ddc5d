"""How much text one token can stand for, so that a hopeless prompt needn't be tokenized."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

# Normalizers that drop no text, and how many characters they make one of at most: what composes
# to one character decomposes to 4 at most (Unicode Standard Annex 15, NFD's expansion factor).
_CHARS_INTO_ONE = {"NFC": 4}
# Pre-tokenizers that cut text up and drop none of it.
_CUTTERS = {"ByteLevel", "Digits", "Punctuation", "Split"}


def longest_token_chars(facts: Mapping[str, Any], byte_letters: Iterable[str]) -> int | None:
    """Characters of a text that one token stands for at most.

    Args:
        facts: tokenizer.json.
        byte_letters: the 256 characters that byte-level vocabularies write bytes with.

    Returns:
        None when there is no such number: a part of the tokenizer may drop text.
    """
    model, added = facts["model"], facts["added_tokens"]
    normalizers = {part["type"] for part in _parts(facts["normalizer"], "normalizers")}
    cutters = _parts(facts["pre_tokenizer"], "pretokenizers")
    keeps_all = (
        model["type"] == "BPE"
        # With every byte in the vocabulary none is unknown, and so none is dropped.
        and model["vocab"].keys() >= set(byte_letters)
        and not model["continuing_subword_prefix"]
        and not model["end_of_word_suffix"]
        and normalizers <= _CHARS_INTO_ONE.keys()
        and "ByteLevel" in {part["type"] for part in cutters} <= _CUTTERS
        and not any(part.get("behavior") == "Removed" for part in cutters)
        # These take the white space beside them along.
        and not any(token["lstrip"] or token["rstrip"] for token in added)
        and not facts["truncation"]
    )
    if not keeps_all:
        return None
    # A token's letters are its bytes, and no fewer than its characters.
    longest = max(map(len, [*model["vocab"], *(token["content"] for token in added)]))
    return longest * math.prod(_CHARS_INTO_ONE[kind] for kind in normalizers)


def _parts(part: Mapping[str, Any] | None, members: str) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer, or all those of a sequence."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [inner for member in part[members] for inner in _parts(member, members)]
