"""The ingest actor's work, without Ray: real uploads on a real store, errors as values."""

from __future__ import annotations

import json
import uuid

import numpy as np
import pytest
from loraplex.adapter_store import (
    AdapterRefused,
    Catalogue,
    LimitExceeded,
    NotFound,
    ObjectStore,
    TenantLimits,
    UploadNotFound,
)
from loraplex.cluster.ingest import IngestWorker, make_uploads
from loraplex.cluster.settings import Settings
from safetensors.numpy import save

from tests.adapters import tiny_base_model

A_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
CONFIG = json.dumps(
    {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
    }
).encode()


def weights(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    return save(
        {
            A_KEY: rng.standard_normal((4, 32)).astype(np.float32),
            A_KEY.replace("lora_A", "lora_B"): rng.standard_normal((32, 4)).astype(np.float32),
        }
    )


@pytest.fixture
def settings(store: ObjectStore, s3_server, tmp_path) -> Settings:
    return Settings.load(
        store_url=store.url,
        store_endpoint=s3_server.endpoint,
        store_access_key=s3_server.access_key,
        store_secret_key=s3_server.secret_key,
        data_dir=tmp_path,
    )


@pytest.fixture
def worker(settings: Settings) -> IngestWorker:
    return IngestWorker(settings, tiny_base_model().to_json())


def stage(settings: Settings, store: ObjectStore, tenant_id: str, data: bytes) -> str:
    upload_id = uuid.uuid4().hex
    make_uploads(settings, store).stage(tenant_id, upload_id, CONFIG, data)
    return upload_id


def test_a_good_upload_becomes_a_version(settings, store, worker):
    catalogue = Catalogue(store)
    tenant = catalogue.create_tenant("acme")
    result = worker.ingest(tenant.id, "style", stage(settings, store, tenant.id, weights(1)))
    assert isinstance(result, dict)
    assert (result["version"], result["rank_max"], result["targets"]) == (1, 4, ["q_proj"])
    assert catalogue.resolve(tenant.id, "style").digest == result["digest"]
    assert not list(store.list("quarantine/"))


def test_errors_come_back_as_values(settings, store, worker):
    catalogue = Catalogue(store)
    tenant = catalogue.create_tenant("acme", TenantLimits(max_adapters=0))
    refused = worker.ingest(tenant.id, "style", stage(settings, store, tenant.id, b"junk"))
    assert isinstance(refused, AdapterRefused)
    assert refused.code == "not_safetensors"
    full = worker.ingest(tenant.id, "style", stage(settings, store, tenant.id, weights(1)))
    assert isinstance(full, LimitExceeded)
    assert isinstance(worker.ingest(tenant.id, "style", "0" * 32), UploadNotFound)
    assert not list(store.list("quarantine/"))
    assert catalogue.adapters(tenant.id) == {}


def test_a_presigned_upload_ends_in_its_record(settings, store, worker):
    tenant = Catalogue(store).create_tenant("acme")
    uploads = make_uploads(settings, store)

    def run(data: bytes | None) -> tuple[str, dict | None, dict | None]:
        record, urls = uploads.create(tenant.id, "style")
        assert set(urls) == {"config", "weights"}
        assert uploads.missing(tenant.id, record.upload_id) == ["config", "weights"]
        if data is not None:
            uploads.stage(tenant.id, record.upload_id, CONFIG, data)
            assert uploads.missing(tenant.id, record.upload_id) == []
        assert uploads.begin(tenant.id, record.upload_id)[1]
        worker.ingest_upload(tenant.id, "style", record.upload_id)
        ended = uploads.get(tenant.id, record.upload_id)
        return ended.status, ended.error, ended.adapter

    status, error, adapter = run(weights(2))
    assert (status, error) == ("ready", None)
    assert adapter is not None
    assert adapter["name"] == "style"
    status, error, adapter = run(b"junk")
    assert (status, adapter) == ("refused", None)
    assert error is not None
    assert error["code"] == "not_safetensors"
    status, error, _ = run(None)
    assert status == "failed"
    assert error is not None
    assert error["code"] == "ingest_failed"


def test_a_failed_upload_may_be_completed_again_and_an_ended_one_not(settings, store):
    tenant = Catalogue(store).create_tenant("acme")
    uploads = make_uploads(settings, store)
    record, _ = uploads.create(tenant.id, "style")
    assert uploads.begin(tenant.id, record.upload_id)[1]
    assert not uploads.begin(tenant.id, record.upload_id)[1]
    uploads.finish(tenant.id, record.upload_id, "failed", error={"code": "x"})
    changed, begun = uploads.begin(tenant.id, record.upload_id)
    assert begun
    assert changed.error is None
    uploads.finish(tenant.id, record.upload_id, "ready", adapter={"version": 1})
    assert not uploads.begin(tenant.id, record.upload_id)[1]
    # A slow worker's upload was begun again: the second one comes too late for the files.
    uploads.finish(tenant.id, record.upload_id, "failed", error={"code": "ingest_failed"})
    ended = uploads.get(tenant.id, record.upload_id)
    assert (ended.status, ended.error, ended.adapter) == ("ready", None, {"version": 1})
    with pytest.raises(NotFound):
        uploads.get(tenant.id, "../catalogue")


def test_urls_name_the_address_that_clients_reach(settings, store):
    public = settings.changed(store_public_endpoint="https://files.example.org")
    _, urls = make_uploads(public, store).create("t-1", "style")
    assert all(url.startswith("https://files.example.org/") for url in urls.values())
