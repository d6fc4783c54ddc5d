"""The alphabet of tenant and adapter names. Names become object-store keys and `model` values."""

from __future__ import annotations

import re

from .errors import InvalidName
from .quoting import show

NAME_RULE = (
    "1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit, "
    "without '..' and without a '.' at the end"
)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


def check_name(name: str, kind: str = "adapter") -> str:
    """Returns `name` when it is well formed.

    Args:
        kind: what is being named, for the message.

    Raises:
        InvalidName: it isn't; the message states the rule.
    """
    if not _NAME.fullmatch(name) or ".." in name or name.endswith("."):
        raise InvalidName(f"{kind} name {show(name)} isn't allowed; a name is {NAME_RULE}")
    return name


def split_version(reference: str) -> tuple[str, int | None]:
    """Splits "name" or "name@3" into the name and the version, None when it isn't given.

    Raises:
        InvalidName: the name or the version isn't well formed.
    """
    name, at, version = reference.partition("@")
    check_name(name)
    if not at:
        return name, None
    if not _VERSION.fullmatch(version):
        raise InvalidName(
            f"version {show(version)} of adapter {show(name)} isn't allowed; it is a positive "
            "number, as in name@3"
        )
    return name, int(version)
