"""From one choice's tokens to the text that the client gets, with logprobs in step with it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ...workers import TokenLogprob, TokenOutput
from .detokenizer import Detokenizer
from .sampling import Plan
from .stop import StopScanner
from .tokenizer import TextTokenizer


@dataclass(frozen=True)
class TokenText:
    """One token and the characters that it completed.

    `offset` counts characters from the start of the generated text (of the prompt, for prompt
    tokens). A token that only begins a character has the text "".
    """

    token_id: int
    text: str
    offset: int
    logprob: TokenLogprob | None

    @property
    def end(self) -> int:
        return self.offset + len(self.text)


@dataclass
class Delta:
    """What one engine output adds to a choice. `tokens` stays empty unless logprobs are asked."""

    text: str = ""
    tokens: list[TokenText] = field(default_factory=list)
    finish_reason: str | None = None


class ChoiceAssembler:
    """Detokenizes, applies stop strings, and releases each token's logprob with its text.

    A stop string counts only in text after the first `min_tokens` tokens. Tokens behind the stop
    string's start are dropped from the logprobs; one that straddles it stays, whole. The stop
    token that ends a choice has neither text nor logprobs. All of them count as generated.
    """

    def __init__(self, tokenizer: TextTokenizer, plan: Plan) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=plan.skip_special_tokens)
        self._tokenizer = tokenizer
        self._scanner = StopScanner(plan.stops)
        self._min_tokens = plan.sampling.min_tokens
        self._stop_ids = tokenizer.eos_ids.union(plan.sampling.stop_token_ids)
        self._keep_tokens = plan.top is not None
        self._waiting: list[TokenText] = []
        self._whole = 0  # of the waiting tokens, those whose last character is complete
        self._seen = 0  # characters detokenized
        self._sent = 0  # characters released
        self.completion_tokens = 0
        self.finish_reason: str | None = None

    def push(self, output: TokenOutput) -> Delta:
        """Must not be called after a delta with a finish reason."""
        text = ""
        for i, token_id in enumerate(output.token_ids):
            self.completion_tokens += 1
            last = i + 1 == len(output.token_ids)
            if last and output.finish_reason == "stop" and self._ends(token_id):
                break
            piece = self._detokenizer.push(token_id)
            if self._keep_tokens:
                logprob = output.logprobs[i] if i < len(output.logprobs) else None
                self._waiting.append(TokenText(token_id, piece, self._seen, logprob))
                if not self._detokenizer.pending:
                    self._whole = len(self._waiting)
                elif piece:
                    self._whole = len(self._waiting) - 1
            self._seen += len(piece)
            text += self._scan(piece)
            if self._scanner.stopped is not None:
                return self._close(text, "stop")
        if output.finish_reason is None:
            self._sent += len(text)
            return Delta(text, self._take_complete())
        tail = self._detokenizer.finish()
        if tail and self._keep_tokens:
            self._attach(tail)
        self._seen += len(tail)
        text += self._scan(tail)
        if self._scanner.stopped is not None:
            return self._close(text, "stop")
        return self._close(text + self._scanner.finish(), output.finish_reason)

    def _ends(self, token_id: int) -> bool:
        return token_id in self._stop_ids or self._tokenizer.is_special(token_id)

    def _scan(self, piece: str) -> str:
        if self.completion_tokens <= self._min_tokens:
            return piece
        return self._scanner.push(piece)

    def _take_complete(self) -> list[TokenText]:
        """Tokens whose text has left. One without text leaves with the text that follows it,
        since a stop string may still cut there."""
        count = 0
        while count < self._whole:
            token = self._waiting[count]
            if token.offset >= self._sent or token.end > self._sent:
                break
            count += 1
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        self._whole -= count
        return taken

    def _attach(self, tail: str) -> None:
        """Gives the replacement character of an unfinished end to the last token in it."""
        owner = max(
            i for i, t in enumerate(self._waiting) if not self._tokenizer.is_special(t.token_id)
        )
        token = self._waiting[owner]
        self._waiting[owner] = replace(token, text=token.text + tail)
        for i in range(owner + 1, len(self._waiting)):
            later = self._waiting[i]
            self._waiting[i] = replace(later, offset=later.offset + len(tail))

    def _close(self, text: str, reason: str) -> Delta:
        self._sent += len(text)
        self.finish_reason = reason
        cut = self._scanner.stopped is not None
        tokens = [t for t in self._waiting if not cut or t.offset < self._sent]
        self._waiting = []
        return Delta(text, tokens, reason)


def prompt_tokens(
    tokenizer: TextTokenizer, ids: tuple[int, ...], logprobs: list[TokenLogprob | None]
) -> list[TokenText]:
    """The prompt's own tokens, for `echo`; special tokens are written out."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    tokens = []
    offset = 0
    for i, token_id in enumerate(ids):
        piece = detokenizer.push(token_id)
        if i + 1 == len(ids):
            piece += detokenizer.finish()
        tokens.append(
            TokenText(token_id, piece, offset, logprobs[i] if i < len(logprobs) else None)
        )
        offset += len(piece)
    return tokens
