"""Options that several commands share, and the connection they describe."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import ClusterError

if TYPE_CHECKING:
    from .cli_client import Client

Url = Annotated[
    str | None,
    typer.Option(
        "--url", help="The service [LORAPLEX_URL; http://127.0.0.1:8000]", show_default=False
    ),
]
Key = Annotated[
    str | None, typer.Option("--key", help="Your key [LORAPLEX_KEY]", show_default=False)
]


class KeyMissing(ClusterError):
    """The command needs a key and none was given."""


def connect(url: str | None, key: str | None) -> Client:
    """Raises KeyMissing when neither the option nor the environment has a key."""
    from .cli_client import DEFAULT_URL, Client

    key = key or os.environ.get("LORAPLEX_KEY")
    if not key:
        raise KeyMissing(
            "no key is given: use --key or LORAPLEX_KEY. `loraplex up` prints the demo's keys and "
            "writes them to .loraplex/demo.json"
        )
    return Client(url or os.environ.get("LORAPLEX_URL") or DEFAULT_URL, key)
