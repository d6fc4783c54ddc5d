"""Grammars that generated text must follow: JSON schemas, regular expressions, choices, Lark.

llguidance compiles them and says, token by token, what may come next. Imports no torch, so that
gateways can refuse a grammar that won't compile before anything is queued.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock

import numpy as np
from llguidance import (
    LLExecutor,
    LLMatcher,
    LLTokenizer,
    grammar_from,
)

from ..errors import GrammarInvalid
from ..request import Grammar
from .grammar_conjunctions import check_conjunctions
from .grammar_limits import check_multiples, limits

MAX_CHOICES = 1024
_THREADS = 2  # that compile at once
_CACHED = 64  # compiled grammars, whose lexers' states add up to megabytes
_MAX_ERROR_CHARS = 400
# A space, or a line's end and its indentation. Without a bound a model may write blanks for ever.
_WHITESPACE = r"[ ]?|\r?\n[ \t]{0,64}"


def check_grammar(grammar: Grammar) -> None:
    """Compiles a grammar without a tokenizer, which is most of the work.

    Raises:
        GrammarInvalid: it can't be compiled; the message says where.
    """
    failed, messages = LLMatcher.validate_grammar_with_warnings(
        _source(grammar), None, limits=limits(grammar.kind)
    )
    if failed:
        raise GrammarInvalid(_first_lines(messages[0]))


class Grammars:
    """Compiles grammars for one model's tokenizer, and remembers them and those it can't compile.

    Args:
        folder: the model's, with a tokenizer.json.
        vocab: columns of the model's logits; ids that the tokenizer lacks are never allowed.
        eos_ids: tokens that end an answer where its grammar may end.
    """

    def __init__(self, folder: str | Path, vocab: int, eos_ids: Iterable[int]):
        self._compiled: OrderedDict[Grammar, LLMatcher | str] = OrderedDict()
        self._lock = Lock()  # of what is compiled
        self._threads = ThreadPoolExecutor(_THREADS, "grammar")
        self._missing = ""  # why there is no tokenizer
        path = Path(folder) / "tokenizer.json"
        try:
            # About a second for 150,000 tokens: not to be waited for by a running engine.
            self._tokenizer = LLTokenizer(
                path.read_text(), n_vocab=vocab, eos_token=list(eos_ids) or None
            )
        except (OSError, ValueError, RuntimeError) as e:
            self._tokenizer = None
            self._missing = f"this model can't follow grammars: {path}: {e}"

    def start(self, grammar: Grammar, output_ids: Sequence[int] = ()) -> GrammarState:
        """The state of a sequence that follows a grammar, and has generated `output_ids` so far.

        Raises:
            GrammarInvalid: it can't be compiled, or the tokens don't follow it.
        """
        found = self._known(grammar)
        if found is None:
            found = self._compile(grammar)
        if isinstance(found, str):
            raise GrammarInvalid(found)
        state = GrammarState(found.deep_copy())
        for token in output_ids:
            state.advance(token)
        if state.error is not None:
            raise GrammarInvalid(f"the tokens so far don't follow the grammar: {state.error}")
        return state

    def compiling(self, grammar: Grammar) -> Future[object] | None:
        """Compiles a grammar beside the engine, which others wait for; None: `start` needn't.

        Some texts take seconds, and no bound on their size tells which. llguidance leaves Python's
        other threads alone meanwhile.
        """
        if self._known(grammar) is not None:
            return None
        return self._threads.submit(self._compile, grammar)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _known(self, grammar: Grammar) -> LLMatcher | str | None:
        """A compiled grammar, or why it can't be."""
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
            return found

    def _compile(self, grammar: Grammar) -> LLMatcher | str:
        known = self._known(grammar)
        if known is not None:  # by another request that waited in front of this one
            return known
        found: LLMatcher | str = self._missing
        if self._tokenizer is not None:
            try:
                source = _source(grammar)
                found = LLMatcher(self._tokenizer, source, log_level=0, limits=limits(grammar.kind))
                if found.is_error():
                    found = _first_lines(found.get_error())
            except GrammarInvalid as e:
                found = str(e)
        with self._lock:
            self._compiled[grammar] = found
            if len(self._compiled) > _CACHED:
                self._compiled.popitem(last=False)
        return found


class GrammarState:
    """How far a sequence has come in its grammar."""

    def __init__(self, matcher: LLMatcher):
        self.matcher = matcher

    def advance(self, token: int) -> None:
        """Takes the token that was chosen."""
        self.matcher.consume_token(token)

    @property
    def error(self) -> str | None:
        """Why the grammar can't go on: a limit was hit, or a token came that it doesn't allow."""
        return _first_lines(self.matcher.get_error()) if self.matcher.is_error() else None

    @property
    def finished(self) -> bool:
        """Nothing more may come."""
        return self.matcher.is_stopped()


def fill_masks(rows: Sequence[tuple[GrammarState, tuple[int, ...]]], vocab: int) -> np.ndarray:
    """What each row may generate next, without ids that are banned beside its grammar.

    A row where nothing would be left keeps the ids that are banned: its grammar ends there.

    Returns:
        int32 [N, ceil(vocab / 32)], bit i % 32 of word i // 32 for id i.
    """
    masks = np.zeros((len(rows), -(-vocab // 32)), dtype=np.int32)
    # A row whose grammar has failed says so by its state; its mask stays empty.
    _executor().unsafe_compute_mask_ptr(
        [(state.matcher, i) for i, (state, _) in enumerate(rows) if state.error is None],
        masks.ctypes.data,
        masks.shape[1] * masks.itemsize,
        len(masks),
    )
    words = masks.view(np.uint32)
    for i, (_, banned) in enumerate(rows):
        ids = np.array([t for t in banned if 0 <= t < vocab], dtype=np.int64)
        if len(ids):
            row = words[i].copy()
            np.bitwise_and.at(row, ids // 32, ~(np.uint32(1) << (ids % 32).astype(np.uint32)))
            if row.any():
                words[i] = row
    return masks


@cache
def _executor() -> LLExecutor:
    return LLExecutor()


def _source(grammar: Grammar) -> str:
    """A grammar in llguidance's own notation. Raises GrammarInvalid."""
    try:
        if grammar.kind in ("json_schema", "grammar"):
            check_multiples(grammar.text)
            check_conjunctions(grammar.text, lark=grammar.kind == "grammar")
        if grammar.kind == "json_schema":
            return LLMatcher.grammar_from_json_schema(
                grammar.text,
                # A schema's "x-guidance" may make less of its other keywords, and tell nobody.
                overrides={
                    "whitespace_pattern": _WHITESPACE,
                    "lenient": False,
                    "coerce_one_of": False,
                },
            )
        if grammar.kind == "choice":
            _check_choices(json.loads(grammar.text))
        return grammar_from(grammar.kind, grammar.text)
    except (ValueError, RecursionError) as e:
        raise GrammarInvalid(_first_lines(str(e))) from None


def _check_choices(choices: object) -> None:
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise GrammarInvalid("choices must be a list of texts that aren't empty")
    if not 0 < len(choices) <= MAX_CHOICES:
        raise GrammarInvalid(f"{len(choices)} choices given, 1 to {MAX_CHOICES} are allowed")


def _first_lines(text: str) -> str:
    return " ".join(text.split())[:_MAX_ERROR_CHARS]
