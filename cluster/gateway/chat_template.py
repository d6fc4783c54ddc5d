"""Hugging Face chat templates: messages to the text that the model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import ApiError, SettingsError

_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


class _TemplateRefusal(Exception):
    """The template itself refused the messages, by `raise_exception`."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}`: marks the assistant's words for training; plain text here."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own way to declare it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise _TemplateRefusal(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class ChatTemplate:
    """A compiled chat template, with the conventions of transformers.

    Args:
        source: Jinja text.
        special_tokens: `bos_token`, `eos_token`, ... as the template names them.

    Raises:
        SettingsError: the template isn't valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise SettingsError(
                f"the chat template is not valid Jinja, line {error.lineno}: {error.message}"
            ) from None
        self._special_tokens = dict(special_tokens)

    @classmethod
    def from_files(cls, folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
        """The template of chat_template.jinja, else of tokenizer_config.json; None: neither."""
        special = {
            name: token["content"] if isinstance(token, Mapping) else token
            for name in _SPECIAL_NAMES
            if (token := tokenizer_config.get(name)) is not None
        }
        file = folder / "chat_template.jinja"
        if file.is_file():
            return cls(file.read_text(), special)
        source = tokenizer_config.get("chat_template")
        if isinstance(source, list):  # several named ones
            by_name = {item["name"]: item["template"] for item in source}
            source = by_name.get("default")
        return cls(source, special) if source else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,  # clients name the variables: "self" is one like any other
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt's text, special tokens included.

        Raises:
            ApiError: 400 `invalid_messages`, when the template refuses these messages.
        """
        names = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **variables,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(names)
        except Exception as error:  # whatever Python raises for variables of another kind
            raise ApiError(
                400,
                "invalid_messages",
                f"the model's chat template refuses these messages: {error}",
                param="messages",
            ) from None
