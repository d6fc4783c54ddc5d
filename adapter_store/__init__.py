"""Loraplex."""

# Formats: what an adapter is, from the upload to the pack file.
from .base_model import BaseModel
from .canonical import (
    CanonicalAdapter,
    CanonicalLayer,
    ExpertFactors,
    LoraFactors,
    canonical_adapter,
    canonical_layer,
)
from .dense_targets import DenseTarget
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
from .pack_layout import PACK_VERSION, DenseEntry, ExpertEntry, LayerSpans, PackLayer, Span
from .pack_writer import write_pack
from .peft_format import AdapterFormat, LoadedAdapter, load_adapter
from .quoting import show

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
    "LayerSpans",
    "LoadedAdapter",
    "LoraFactors",
    "Pack",
    "PackCorrupt",
    "PackInfo",
    "PackLayer",
    "PackLayoutError",
    "PackVersionError",
    "Span",
    "adapter_digest",
    "canonical_adapter",
    "canonical_layer",
    "check_name",
    "load_adapter",
    "make_pack",
    "show",
    "split_version",
    "write_pack",
]

# Store: where adapters, tenants and keys are kept.
from .catalogue import Catalogue
from .catalogue_document import BlobNeeded
from .disk_tier import DiskTier
from .documents import Document, Record
from .documents import create as create_document
from .documents import read as read_document
from .documents import update as update_document
from .embedded import EmbeddedS3
from .epoch import next_epoch
from .errors import (
    AdapterCorrupt,
    AdapterNotFound,
    Conflict,
    DocumentError,
    EmbeddedStoreError,
    FetchCancelled,
    KeyNotFound,
    LimitExceeded,
    LocalDiskError,
    NameTaken,
    NotFound,
    PreconditionFailed,
    StoreDenied,
    StoreError,
    StoreUnavailable,
    TenantExists,
    TenantNotFound,
    UploadNotFound,
)
from .host_tier import HostTier, host_folder
from .layout import quarantine_keys
from .model_source import ModelSource
from .object_store import ObjectInfo, ObjectStore
from .pins import PackPin
from .publisher import Publisher
from .quarantine import UploadSizes, discard_upload, stage_upload
from .records import (
    AdapterAlias,
    AdapterVersion,
    KeyRecord,
    Tenant,
    TenantLimits,
    VersionMeta,
)
from .repack import Repacker
from .store_check import Finding, check_store
from .store_export import export_adapters
from .store_repair import Repair, carry_out, plan_repairs
from .store_requests import store_requests
from .sweep import SweepReport, sweep

__all__ += [
    "AdapterAlias",
    "AdapterCorrupt",
    "AdapterNotFound",
    "AdapterVersion",
    "BlobNeeded",
    "Catalogue",
    "Conflict",
    "DiskTier",
    "Document",
    "DocumentError",
    "EmbeddedS3",
    "EmbeddedStoreError",
    "FetchCancelled",
    "Finding",
    "HostTier",
    "KeyNotFound",
    "KeyRecord",
    "LimitExceeded",
    "LocalDiskError",
    "ModelSource",
    "NameTaken",
    "NotFound",
    "ObjectInfo",
    "ObjectStore",
    "PackPin",
    "PreconditionFailed",
    "Publisher",
    "Record",
    "Repacker",
    "Repair",
    "StoreDenied",
    "StoreError",
    "StoreUnavailable",
    "SweepReport",
    "Tenant",
    "TenantExists",
    "TenantLimits",
    "TenantNotFound",
    "UploadNotFound",
    "UploadSizes",
    "VersionMeta",
    "carry_out",
    "check_store",
    "create_document",
    "discard_upload",
    "export_adapters",
    "host_folder",
    "next_epoch",
    "plan_repairs",
    "quarantine_keys",
    "read_document",
    "stage_upload",
    "store_requests",
    "sweep",
    "update_document",
]
