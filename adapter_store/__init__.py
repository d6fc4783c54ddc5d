"""Loraplex."""

# Formats: what an adapter is, from the upload to the pack file.
from .base_model import BaseModel, DenseTarget
from .canonical import (
    CanonicalAdapter,
    CanonicalLayer,
    ExpertFactors,
    LoraFactors,
    canonical_adapter,
    canonical_layer,
)
from .digest import DIGEST_VERSION, adapter_digest
from .errors import (
    REFUSAL_CODES,
    AdapterRefused,
    AdapterStoreError,
    BaseModelError,
    InvalidName,
    PackCorrupt,
    PackLayoutError,
    PackVersionError,
)
from .make_pack import PackInfo, make_pack
from .names import check_name, split_version
from .pack import Pack
from .pack_layout import PACK_VERSION, DenseEntry, ExpertEntry, PackLayer
from .pack_writer import write_pack
from .peft_format import AdapterFormat, LoadedAdapter, load_adapter

__all__ = [
    "DIGEST_VERSION",
    "PACK_VERSION",
    "REFUSAL_CODES",
    "AdapterFormat",
    "AdapterRefused",
    "AdapterStoreError",
    "BaseModel",
    "BaseModelError",
    "CanonicalAdapter",
    "CanonicalLayer",
    "DenseEntry",
    "DenseTarget",
    "ExpertEntry",
    "ExpertFactors",
    "InvalidName",
    "LoadedAdapter",
    "LoraFactors",
    "Pack",
    "PackCorrupt",
    "PackInfo",
    "PackLayer",
    "PackLayoutError",
    "PackVersionError",
    "adapter_digest",
    "canonical_adapter",
    "canonical_layer",
    "check_name",
    "load_adapter",
    "make_pack",
    "split_version",
    "write_pack",
]
