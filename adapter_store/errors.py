"""Errors raised by the adapter store."""

from __future__ import annotations


class AdapterStoreError(Exception):
    """Base of every error the adapter store raises on purpose."""


class BaseModelError(AdapterStoreError):
    """A model folder can't be read as a base model."""


class InvalidName(AdapterStoreError):
    """A tenant's or adapter's name is outside the stated alphabet."""


class AdapterRefused(AdapterStoreError):
    """An upload isn't an adapter that can be served on this base model.

    Attributes:
        code: stable, machine-readable reason, one of `REFUSAL_CODES`.
        message: what is wrong, with which name and value, and what would be right.
        key: the tensor key or the adapter_config.json field at fault, None when it is the whole
            upload.
    """

    def __init__(self, code: str, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.key = key

    def __reduce__(self) -> tuple[type[AdapterRefused], tuple[str, str, str | None]]:
        # It crosses process borders; Exception's own pickling would pass the message alone.
        return type(self), (self.code, self.message, self.key)


REFUSAL_CODES = {
    "not_safetensors": "the weights file isn't safetensors: a pickle, a zip, less than a header",
    "bad_header": "the safetensors header contradicts itself, or the file, which may be cut short",
    "bad_config": "adapter_config.json can't be read, or a field has a value it can't have",
    "unsupported_peft_type": "another PEFT method than LoRA",
    "unsupported_feature": "a LoRA variant or training option that isn't served",
    "wrong_base": "made for another base model",
    "unknown_key": "a tensor whose name isn't one of a LoRA factor of this model",
    "unsupported_target": "a LoRA factor of a module that isn't served (router, lm_head, ...)",
    "not_targeted": "a tensor of a module that adapter_config.json doesn't target",
    "duplicate_key": "two tensors for one factor",
    "missing_pair": "a LoRA A without its B, or the other way round",
    "unsupported_dtype": "a tensor that is neither F32, F16 nor BF16",
    "wrong_shape": "a factor whose shape doesn't fit the base model and the configured rank",
    "ambiguous_layout": "fused expert factors whose orientation nothing decides",
    "rank_limit": "a rank below 1, or above what this service is set up for (at most 256)",
    "non_finite": "a factor with NaN or infinite values",
    "empty_adapter": "no tensor at all, or none of any rank",
    "too_large": "a file larger than this service takes",
}


class PackCorrupt(AdapterStoreError):
    """A pack file's bytes aren't those that were written (or it isn't a pack at all)."""


class PackVersionError(AdapterStoreError):
    """A pack of another format version: remake it from its source."""


class PackLayoutError(AdapterStoreError):
    """A part of a pack was asked for that its layout can't give."""


class StoreError(AdapterStoreError):
    """Something went wrong between here and the object store."""


class StoreUnavailable(StoreError):
    """The object store can't be reached or doesn't answer. A write may or may not have happened."""


class StoreDenied(StoreUnavailable):
    """The object store refused the credentials, or they don't allow the operation."""


class PreconditionFailed(StoreError):
    """A conditional write lost: the object isn't what the writer had read."""


class Conflict(PreconditionFailed):
    """Another conditional write to the same object was under way; nothing was written."""


class DocumentError(StoreError):
    """A document isn't what this version of Loraplex can read."""


class NotFound(StoreError):
    """There is no such object."""


class TenantNotFound(NotFound):
    """There is no tenant of this id."""


class KeyNotFound(NotFound):
    """The tenant has no API key of this id."""


class AdapterNotFound(NotFound):
    """The tenant has no adapter of this name, or the adapter no such version."""


class UploadNotFound(NotFound):
    """A file of the upload isn't in the quarantine."""


class NameTaken(AdapterStoreError):
    """The name belongs to something else already."""


class TenantExists(NameTaken):
    """There is a tenant of this name already."""


class LimitExceeded(AdapterStoreError):
    """It would go beyond one of the tenant's limits.

    Attributes:
        limit: the limit's name in TenantLimits, or what else is full.
    """

    def __init__(self, message: str, limit: str) -> None:
        super().__init__(message)
        self.message = message
        self.limit = limit

    def __reduce__(self) -> tuple[type[LimitExceeded], tuple[str, str]]:
        return type(self), (self.message, self.limit)


class AdapterCorrupt(AdapterStoreError):
    """A stored pack is damaged, also when fetched a second time."""


class FetchCancelled(AdapterStoreError):
    """Nobody waits for the pack any more; what has come of it is kept for the next who asks."""


class LocalDiskError(AdapterStoreError):
    """A folder of this machine is full or can't be written."""


class EmbeddedStoreError(AdapterStoreError):
    """The embedded object store can't be started."""
