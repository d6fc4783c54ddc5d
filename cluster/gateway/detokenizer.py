"""Tokens to text, one token at a time."""

from __future__ import annotations

import codecs

from .tokenizer import TextTokenizer


class Detokenizer:
    """Joins the bytes of byte-level BPE tokens and releases whole characters only.

    The pieces of any sequence, with `finish` last, join to what decoding the whole sequence at
    once gives; bytes that never become a character turn into U+FFFD in both.
    """

    def __init__(self, tokenizer: TextTokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; often none, seldom several."""
        if self._skip and self._tokenizer.is_special(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    @property
    def pending(self) -> bool:
        """Whether bytes wait for the rest of their character."""
        return bool(self._decoder.getstate()[0])

    def finish(self) -> str:
        """What is left when no token follows."""
        return self._decoder.decode(b"", final=True)
