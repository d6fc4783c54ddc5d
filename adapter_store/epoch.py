"""Epochs fence off a role's earlier holders: each start takes the next one."""

from __future__ import annotations

from . import layout
from .documents import Document, update
from .names import check_name
from .object_store import ObjectStore


class EpochDocument(Document):
    """meta/epoch-<role>.json."""

    epoch: int = 0


def next_epoch(store: ObjectStore, role: str = "controller") -> int:
    """A number greater than any that this role was given before; no two callers get the same.

    Raises:
        StoreUnavailable: a number may have been taken; nobody else will get it.
    """

    def take(document: EpochDocument) -> int:
        document.epoch += 1
        return document.epoch

    key = layout.epoch_key(check_name(role, "role"))
    return update(store, key, EpochDocument, take, create=EpochDocument)
