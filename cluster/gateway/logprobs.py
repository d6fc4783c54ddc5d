"""Logprobs in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...workers import TokenLogprob
from .assembler import TokenText
from .tokenizer import TextTokenizer

LOWEST = -9999.0  # JSON has no minus infinity; OpenAI's API writes this


def _number(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST


def _shown(tokenizer: TextTokenizer, token: TokenText) -> str:
    # Special tokens have no text in the answer, but a name is of more use here than "".
    if not token.text and tokenizer.is_special(token.token_id):
        return tokenizer.token_name(token.token_id)
    return token.text


def chat_logprobs(
    tokenizer: TextTokenizer, tokens: Sequence[TokenText], top: int
) -> dict[str, Any]:
    """`choices[].logprobs` of chat completions.

    The `token` strings of a choice join to its content, special tokens apart; `bytes` are those of
    the single token. Among the alternatives a token that is no whole character is written
    `bytes:\\xe2`.
    """
    content = []
    for token in tokens:
        if token.logprob is None:
            continue
        alternatives = [
            {
                "token": tokenizer.token_name(token_id),
                "logprob": _number(logprob),
                "bytes": list(tokenizer.token_bytes(token_id)),
            }
            for token_id, logprob in token.logprob.top[:top]
        ]
        content.append(
            {
                "token": _shown(tokenizer, token),
                "logprob": _number(token.logprob.logprob),
                "bytes": list(tokenizer.token_bytes(token.token_id)),
                "top_logprobs": alternatives,
            }
        )
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: TextTokenizer, tokens: Sequence[TokenText], top: int, base_offset: int = 0
) -> dict[str, Any]:
    """`choices[].logprobs` of text completions.

    `top_logprobs` names the chosen token too, also when it isn't among the likeliest. The first
    token of an echoed prompt has neither (null).
    """
    names: list[str] = []
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token in tokens:
        shown = _shown(tokenizer, token)
        names.append(shown)
        offsets.append(base_offset + token.offset)
        if token.logprob is None:
            logprobs.append(None)
            tops.append(None)
            continue
        logprobs.append(_number(token.logprob.logprob))
        alternatives = {
            shown if token_id == token.token_id else tokenizer.token_name(token_id): _number(value)
            for token_id, value in token.logprob.top[:top]
        }
        alternatives.setdefault(shown, _number(token.logprob.logprob))
        tops.append(alternatives)
    return {
        "tokens": names,
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def prompt_logprobs(
    tokenizer: TextTokenizer, logprobs: Sequence[TokenLogprob | None], top: int
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each token of the prompt its alternatives by id, itself too.

    The first token has none (null).
    """
    return [None if entry is None else _by_id(tokenizer, entry, top) for entry in logprobs]


def _by_id(tokenizer: TextTokenizer, entry: TokenLogprob, top: int) -> dict[str, Any]:
    shown = [(entry.token_id, entry.logprob, entry.rank)]
    shown += [
        (token_id, logprob, place)
        for place, (token_id, logprob) in enumerate(entry.top[:top], 1)
        if token_id != entry.token_id
    ]
    return {
        str(token_id): {
            "logprob": _number(logprob),
            "rank": rank,
            "decoded_token": tokenizer.token_name(token_id),
        }
        for token_id, logprob, rank in shown
    }
