"""JSON objects that take no fields but their own."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class ClosedModel(BaseModel):
    """Refuses unknown fields by name; a host of them in one error, since each would be an error of
    its own, and a body has room for a million."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        most = 2 * len(cls.model_fields) + 10
        if isinstance(value, dict) and len(value) > most:
            names = ", ".join(field.alias or name for name, field in cls.model_fields.items())
            raise ValueError(f"{len(value)} fields are given; there are {names}")
        return value
