"""Answers in a prescribed form: OpenAI's response_format, vLLM's structured_outputs."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field, StrictBool, StrictStr

from ...workers import Grammar, GrammarInvalid, check_grammar
from ..errors import ApiError
from .closed_model import ClosedModel
from .deps import GatewayDeps

_REMEMBERED = 256  # grammars whose verdict is kept
_ANY_OBJECT = '{"type":"object"}'
_KINDS = ("json_schema", "regex", "choice", "grammar", "json_object")


class JsonSchemaFormat(ClosedModel):
    """The schema is followed to the letter whatever `strict` says."""

    name: StrictStr | None = None
    description: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(ClosedModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(ClosedModel):
    """One of its fields. `json` may be a schema as text, `grammar` is in Lark or GBNF."""

    json_schema: dict[str, Any] | StrictStr | None = Field(None, alias="json")
    regex: StrictStr | None = None
    choice: list[StrictStr] | None = Field(None, fail_fast=True)
    grammar: StrictStr | None = None
    json_object: StrictBool | None = None


def grammar_of(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None, max_bytes: int
) -> tuple[Grammar | None, str]:
    """What the answer must look like, None: anything; and the field that says so.

    Raises:
        ApiError: 400 for two forms at once, for none, and for one above `max_bytes`.
    """
    grammars = []
    if response_format is not None and (grammar := _of_format(response_format)) is not None:
        grammars.append((grammar, "response_format"))
    if structured is not None:
        grammars.append((_of_structured(structured), "structured_outputs"))
    if not grammars:
        return None, ""
    grammar, param = grammars[0]
    if len(grammars) > 1:
        raise _invalid("response_format and structured_outputs are both given", param)
    size = len(grammar.text.encode(errors="replace"))
    if size > max_bytes:
        raise _invalid(f"{param} has {size} bytes, at most {max_bytes} are allowed", param)
    return grammar, param


async def check(deps: GatewayDeps, grammar: Grammar | None, param: str) -> None:
    """Compiles a grammar, unless that was done lately. Raises ApiError 400 when it fails.

    Args:
        param: the request's field that it stands in.
    """
    if grammar is not None and (error := await deps.compute(_compile_error, grammar)):
        message = f"the answer can't be made to follow this {grammar.kind}: {error}"
        raise ApiError(400, "invalid_grammar", message, param=param)


@lru_cache(maxsize=_REMEMBERED)
def _compile_error(grammar: Grammar) -> str | None:
    try:
        check_grammar(grammar)
    except GrammarInvalid as error:
        return str(error)
    return None


def _of_format(given: ResponseFormat) -> Grammar | None:
    if given.type != "json_schema" and given.json_schema is not None:
        text = f"response_format.json_schema needs type json_schema; type {given.type} is given"
        raise _invalid(text, "response_format.json_schema")
    if given.type == "text":
        return None
    if given.type == "json_object":
        return Grammar("json_schema", _ANY_OBJECT)
    if given.json_schema is None:
        raise _invalid("response_format.json_schema is missing", "response_format.json_schema")
    schema = given.json_schema.schema_
    return Grammar(
        "json_schema", _ANY_OBJECT if schema is None else _text(schema, "response_format")
    )


def _of_structured(given: StructuredOutputs) -> Grammar:
    forms = [name for name in _KINDS if getattr(given, name) not in (None, False)]
    if len(forms) != 1:
        names = "json, regex, choice, grammar, json_object"
        raise _invalid(
            f"structured_outputs needs one of {names}; {len(forms)} are given", "structured_outputs"
        )
    if given.json_object:
        return Grammar("json_schema", _ANY_OBJECT)
    if given.regex is not None:
        return Grammar("regex", given.regex)
    if given.grammar is not None:
        return Grammar("grammar", given.grammar)
    if given.choice is not None:
        return Grammar("choice", _text(given.choice, "structured_outputs"))
    schema = given.json_schema
    text = schema if isinstance(schema, str) else _text(schema, "structured_outputs")
    return Grammar("json_schema", text)


def _text(value: Any, param: str) -> str:
    # The order of properties is part of a schema's meaning: it is that of the answer.
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (ValueError, RecursionError) as error:
        raise _invalid(f"the schema isn't JSON: {error}", param) from None


def _invalid(message: str, param: str) -> ApiError:
    return ApiError(400, "invalid_value", message, param=param)
