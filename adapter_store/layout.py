"""Keys of everything in the object store.

    tenants/<id>/tenant.json           name, limits, ids and hashes of its API keys
    tenants/<id>/catalogue.json        its adapters: names, versions, digests
    tenants/<id>/blobs/<digest>/<blob>/{pack-v1.bin, source.safetensors, adapter_config.json}
    names/<tenant name>.json           whose name it is
    keys/<sha256 of the key>.json      whose key it is
    quarantine/<tenant>/<upload>/...   uploads that nobody has checked yet
    auth/generation.json               moves with every change of the above
    meta/admin.json                    hash of the admin key
    meta/epoch-<name>.json             newest epoch of a fenced role

A digest's content lies under a blob id that is made anew by each publish. So whoever deletes a
blob can't take away what another publish of the same digest has just written, and readers may take
any blob of the digest: all hold the same adapter.
"""

from __future__ import annotations

from .pack_layout import PACK_VERSION

PACK_FILE = f"pack-v{PACK_VERSION}.bin"
SOURCE_FILE = "source.safetensors"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

TENANTS = "tenants/"
QUARANTINE = "quarantine/"
GENERATION = "auth/generation.json"
ADMIN = "meta/admin.json"


def is_pack(name: str) -> bool:
    """Whether a blob's file is a pack, of any version."""
    return name.startswith("pack-v") and name.endswith(".bin")


def tenant_folder(tenant_id: str) -> str:
    return f"{TENANTS}{tenant_id}/"


def tenant_key(tenant_id: str) -> str:
    return f"{TENANTS}{tenant_id}/tenant.json"


def catalogue_key(tenant_id: str) -> str:
    return f"{TENANTS}{tenant_id}/catalogue.json"


def blobs_folder(tenant_id: str, digest: str | None = None) -> str:
    return f"{TENANTS}{tenant_id}/blobs/" + (f"{digest}/" if digest else "")


def blob_folder(tenant_id: str, digest: str, blob: str) -> str:
    return f"{TENANTS}{tenant_id}/blobs/{digest}/{blob}/"


def tenant_name_key(name: str) -> str:
    return f"names/{name}.json"


def api_key_key(sha256: str) -> str:
    return f"keys/{sha256}.json"


def quarantine_folder(tenant_id: str, upload_id: str | None = None) -> str:
    return f"{QUARANTINE}{tenant_id}/" + (f"{upload_id}/" if upload_id else "")


def quarantine_keys(tenant_id: str, upload_id: str) -> tuple[str, str]:
    """Where an upload's adapter_config.json and adapter_model.safetensors are put."""
    folder = quarantine_folder(tenant_id, upload_id)
    return folder + CONFIG_FILE, folder + WEIGHTS_FILE


def epoch_key(role: str) -> str:
    return f"meta/epoch-{role}.json"
