"""Publishing: from quarantine to a served version, whatever goes wrong on the way."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
from botocore.exceptions import BotoCoreError
from loraplex.adapter_store import (
    AdapterNotFound,
    AdapterRefused,
    BaseModel,
    Catalogue,
    DiskTier,
    InvalidName,
    LimitExceeded,
    LocalDiskError,
    NotFound,
    ObjectStore,
    Pack,
    Publisher,
    StoreUnavailable,
    TenantLimits,
    TenantNotFound,
    UploadNotFound,
    UploadSizes,
    check_store,
    make_pack,
    plan_repairs,
    quarantine_keys,
    sweep,
)

from tests.adapter_store.faults import FaultyStore
from tests.adapter_store.uploads import BASE, Service, Upload, upload
from tests.adapters import tiny_base_model

DAY = timedelta(days=1)


@pytest.fixture
def service(store: ObjectStore, tmp_path: Path) -> Service:
    return Service(store, tmp_path / "scratch")


def digest_of(files: Upload, folder: Path) -> str:
    (folder / "weights").write_bytes(files.weights)
    return make_pack(files.config, folder / "weights", BASE, folder / "pack").digest


def test_an_upload_becomes_a_version(service: Service, tmp_path: Path) -> None:
    files = upload(1)
    version = service.publish("bot", files)
    assert (version.version, version.status, version.format) == (1, "ready", "attention")
    assert (version.rank_max, version.targets) == (4, ("q_proj",))
    assert version.digest == digest_of(files, tmp_path)
    assert service.catalogue.resolve(service.tenant_id, "bot") == version
    folder = f"tenants/{service.tenant_id}/blobs/{version.digest}/{version.blob}/"
    assert service.blob_keys() == {
        folder + "pack-v1.bin",
        folder + "source.safetensors",
        folder + "adapter_config.json",
    }
    assert service.store.get(folder + "source.safetensors")[0] == files.weights
    assert service.store.get(folder + "adapter_config.json")[0] == files.config
    service.store.download(folder + "pack-v1.bin", tmp_path / "got")
    pack = Pack.open(tmp_path / "got")
    assert (pack.digest, pack.nbytes) == (version.digest, version.nbytes)
    assert not service.keys("quarantine/")
    assert not list((tmp_path / "scratch").iterdir())


def test_the_same_content_is_stored_once(service: Service) -> None:
    first = service.publish("bot", upload(1))
    blobs = service.blob_keys()
    assert service.publish("bot", upload(1)) == first
    twin = service.publish("twin", upload(1))
    assert (twin.digest, twin.blob) == (first.digest, first.blob)
    assert service.blob_keys() == blobs
    service.catalogue.delete_adapter(service.tenant_id, "bot")
    assert service.blob_keys() == blobs  # the twin still names it
    service.catalogue.delete_adapter(service.tenant_id, "twin")
    assert not service.blob_keys()


def test_versions_keep_their_content(service: Service, tmp_path: Path) -> None:
    versions = [service.publish("bot", upload(i)) for i in range(3)]
    service.catalogue.rollback(service.tenant_id, "bot", 1)
    tier = DiskTier(tmp_path / "disk", service.store, 1 << 20)
    for version in versions:
        path, _ = tier.ensure(service.tenant_id, version.digest)
        assert Pack.open(path).digest == version.digest


@pytest.mark.parametrize(
    ("files", "code"),
    [
        (upload(1, broken=True), "non_finite"),
        (Upload(upload(1).config, b"\x80\x02pickle"), "not_safetensors"),
        (Upload(b"{}", upload(1).weights), None),
        (Upload(upload(1).config, upload(1).weights[:-100]), None),
        (upload(1, base=tiny_base_model(name="elsewhere")), "wrong_base"),
    ],
    ids=["nan", "pickle", "no config", "cut short", "another base"],
)
def test_a_refused_upload_leaves_nothing(
    service: Service, tmp_path: Path, files: Upload, code: str | None
) -> None:
    before = service.keys()
    with pytest.raises(AdapterRefused) as refusal:
        service.publish("bot", files)
    if code:
        assert refusal.value.code == code
    assert service.keys() == before
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("name", ["Bot", "a/b", "bot@2", "", "tiny"])
def test_a_name_that_cannot_be_published_leaves_nothing(service: Service, name: str) -> None:
    before = service.keys()
    with pytest.raises(InvalidName):
        service.publish(name, upload(1))
    assert service.keys() == before


def test_tenants_limits_leave_nothing(service: Service) -> None:
    limits = TenantLimits(max_adapters=1)
    service.catalogue.update_tenant(service.tenant_id, limits=limits)
    service.publish("bot", upload(1))
    before = service.keys()
    with pytest.raises(LimitExceeded):
        service.publish("second", upload(2))
    assert service.keys() == before


def test_large_uploads_are_refused_before_they_are_copied(
    store: ObjectStore, tmp_path: Path
) -> None:
    faulty = FaultyStore(store)
    catalogue = Catalogue(store)
    tenant_id = catalogue.create_tenant("acme").id
    files = upload(1)
    for sizes, file in (
        (UploadSizes(weights=len(files.weights) - 1), "adapter_model.safetensors"),
        (UploadSizes(config=len(files.config) - 1), "adapter_config.json"),
    ):
        publisher = Publisher(faulty, catalogue, BASE, tmp_path / "scratch", sizes)
        publisher.stage_upload(tenant_id, "u", files.config, files.weights)
        with pytest.raises(AdapterRefused, match="bytes") as refusal:
            publisher.ingest(tenant_id, "bot", "u")
        assert (refusal.value.code, refusal.value.key) == ("too_large", file)
        assert not list(store.list("quarantine/"))
    assert faulty.downloads == []


def test_uploads_that_are_not_there(service: Service) -> None:
    ingest = service.publisher.ingest
    with pytest.raises(UploadNotFound, match="u9"):
        ingest(service.tenant_id, "bot", "u9")
    config_key, _ = quarantine_keys(service.tenant_id, "half")
    service.store.put(config_key, upload(1).config)
    with pytest.raises(UploadNotFound, match="half"):
        ingest(service.tenant_id, "bot", "half")
    for upload_id in ("", "..", "../x", "a/b", "x" * 65):
        with pytest.raises(InvalidName, match="upload id"):
            ingest(service.tenant_id, "bot", upload_id)
    service.publisher.stage_upload("t-gone", "u", b"", b"")
    with pytest.raises(TenantNotFound):
        ingest("t-gone", "bot", "u")
    assert not service.keys("quarantine/")


class Died(BaseException):
    """The process ends here."""


def test_a_crash_at_any_write_leaves_all_or_nothing_and_garbage_for_the_sweep(
    service: Service, tmp_path: Path
) -> None:
    """Kills the ingest at its n-th write, until one n lets it pass."""
    old = service.publish("bot", upload(0))
    for step in range(30):
        faulty = FaultyStore(service.store)
        left = step

        def fail(action: str, key: str) -> bool:
            nonlocal left
            if action in ("put", "upload", "delete"):
                left -= 1
                if left < 0:
                    raise Died
            return False

        faulty.fail = fail
        publisher = Publisher(faulty, Catalogue(faulty), BASE, tmp_path / f"s{step}")
        files = upload(100 + step)
        service.publisher.stage_upload(service.tenant_id, "u", files.config, files.weights)
        try:
            version = publisher.ingest(service.tenant_id, "bot", "u")
            died = False
        except Died:
            died = True
            version = service.catalogue.resolve(service.tenant_id, "bot")
        # Whatever the name stands for can be served.
        tier = DiskTier(tmp_path / f"d{step}", service.store, 1 << 20)
        assert tier.ensure(service.tenant_id, version.digest)[1] == "s3"
        sweep(service.store, service.catalogue, 0, datetime.now(UTC) + DAY)
        in_use = service.catalogue.blobs_in_use(service.tenant_id)
        found = {tuple(key.split("/")[3:5]) for key in service.blob_keys()}
        assert found == in_use
        assert not service.keys("quarantine/")
        if not died:
            break
    assert not died
    assert step >= 5
    assert service.catalogue.resolve(service.tenant_id, "bot@1") == old


def test_a_publish_whose_catalogue_response_got_lost_is_one_version(service: Service) -> None:
    service.publish("bot", upload(0))
    faulty = FaultyStore(service.store)

    def lose(key: str) -> None:
        if key.endswith("catalogue.json") and not lost:
            lost.append(key)
            faulty.lose_responses = 1

    lost: list[str] = []
    faulty.before_put = lose
    service.publisher = Publisher(faulty, Catalogue(faulty), BASE, service.publisher._scratch)
    version = service.publish("bot", upload(1))
    assert lost
    assert version.version == 2
    alias = service.catalogue.adapters(service.tenant_id)["bot"]
    assert [v.version for v in alias.versions] == [1, 2]
    assert len(service.blob_keys()) == 6


def test_an_unreachable_store_is_no_refusal(service: Service, tmp_path: Path) -> None:
    """With the outcome unknown the blob must stay: the catalogue may name it."""
    faulty = FaultyStore(service.store)
    faulty.before_put = lambda key: cut_off() if key.endswith("catalogue.json") else None

    def cut_off() -> None:
        faulty.lose_responses = 1
        faulty.fail = lambda action, key: True  # from here on nothing gets through

    publisher = Publisher(faulty, Catalogue(faulty), BASE, tmp_path / "scratch")
    files = upload(5)
    publisher.stage_upload(service.tenant_id, "u", files.config, files.weights)
    with pytest.raises(StoreUnavailable):
        publisher.ingest(service.tenant_id, "bot", "u")
    version = service.catalogue.resolve(service.tenant_id, "bot")
    tier = DiskTier(tmp_path / "disk", service.store, 1 << 20)
    tier.ensure(service.tenant_id, version.digest)
    assert service.keys("quarantine/")
    report = sweep(service.store, service.catalogue, 0, datetime.now(UTC) + DAY)
    assert (report.uploads, report.blobs) == (1, 0)


def test_publish_and_delete_of_one_digest_at_once_lose_nothing(
    service: Service, tmp_path: Path
) -> None:
    """Two names, one content: one is deleted again and again while the other is published."""
    files = upload(3)
    stop = threading.Event()

    def churn() -> int:
        rounds = 0
        while not stop.is_set():
            service.publish("churn", files)
            service.catalogue.delete_adapter(service.tenant_id, "churn")
            rounds += 1
        return rounds

    tier = DiskTier(tmp_path / "disk", service.store, 1 << 20)
    key = f"{service.tenant_id}/{service.publish('kept', files).digest}"
    with ThreadPoolExecutor(1) as threads:
        churning = threads.submit(churn)
        try:
            for _ in range(12):
                if random.random() < 0.7:
                    service.catalogue.delete_adapter(service.tenant_id, "kept")
                version = service.publish("kept", files)
                tier.remove(key)
                tier.ensure(service.tenant_id, version.digest)
        finally:
            stop.set()
        assert churning.result() > 0
    in_use = service.catalogue.blobs_in_use(service.tenant_id)
    assert {tuple(key.split("/")[3:5]) for key in service.blob_keys()} == in_use
    assert len(in_use) == 1


def test_a_delete_between_blob_and_alias_takes_nothing_away(
    service: Service, tmp_path: Path
) -> None:
    """The narrowest race, staged: the other name goes away just before ours is written."""
    files = upload(3)
    service.publish("other", files)
    faulty = FaultyStore(service.store)
    deleted: list[str] = []

    def delete_other(key: str) -> None:
        if key.endswith("catalogue.json") and not deleted:
            deleted.append(key)
            service.catalogue.delete_adapter(service.tenant_id, "other")

    faulty.before_put = delete_other
    publisher = Publisher(faulty, Catalogue(faulty), BASE, tmp_path / "scratch")
    publisher.stage_upload(service.tenant_id, "x", files.config, files.weights)
    version = publisher.ingest(service.tenant_id, "ours", "x")
    assert deleted
    DiskTier(tmp_path / "disk", service.store, 1 << 20).ensure(service.tenant_id, version.digest)
    assert set(service.catalogue.adapters(service.tenant_id)) == {"ours"}
    assert len(service.blob_keys()) == 3


def test_a_tenant_deleted_during_ingest_leaves_nothing(service: Service, tmp_path: Path) -> None:
    faulty = FaultyStore(service.store)
    done: list[str] = []

    def delete_tenant(key: str) -> None:
        if key.endswith("catalogue.json") and not done:
            done.append(key)
            service.catalogue.delete_tenant(service.tenant_id)

    faulty.before_put = delete_tenant
    publisher = Publisher(faulty, Catalogue(faulty), BASE, tmp_path / "scratch")
    files = upload(3)
    publisher.stage_upload(service.tenant_id, "x", files.config, files.weights)
    with pytest.raises(TenantNotFound):
        publisher.ingest(service.tenant_id, "bot", "x")
    assert done
    assert not service.keys("tenants/")
    assert not service.keys("quarantine/")


def test_the_sweep_takes_only_what_is_old_and_unnamed(service: Service) -> None:
    version = service.publish("bot", upload(1))
    folder = f"tenants/{service.tenant_id}/blobs/"
    garbage = {
        f"{folder}{version.digest}/{'0' * 16}/pack-v1.bin",
        f"{folder}{'a' * 64}/{'1' * 16}/source.safetensors",
        f"tenants/t-gone/blobs/{'b' * 64}/{'2' * 16}/pack-v1.bin",
        f"quarantine/{service.tenant_id}/left/adapter_config.json",
        "quarantine/t-gone/left/adapter_model.safetensors",
    }
    kept = service.keys()
    for key in garbage:
        service.store.put(key, b"x")
    young = sweep(service.store, service.catalogue)
    assert (young.uploads, young.blobs, young.tenants) == (0, 0, 0)
    assert service.keys() == kept | garbage
    report = sweep(service.store, service.catalogue, now=datetime.now(UTC) + 2 * DAY)
    assert (report.uploads, report.blobs, report.tenants) == (2, 3, 0)
    assert service.keys() == kept


def test_the_sweep_ends_what_a_killed_writer_left_in_parts(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, key = service.store._client, f"tenants/{service.tenant_id}/blobs/x/y/pack-v1.bin"
    place = {"Bucket": service.store.bucket, "Key": service.store._prefix + key}
    upload_id = client.create_multipart_upload(**place)["UploadId"]
    client.upload_part(**place, UploadId=upload_id, PartNumber=1, Body=bytes(5 << 20))

    def left() -> int:
        found = client.list_multipart_uploads(Bucket=place["Bucket"], Prefix=place["Key"])
        return len(found.get("Uploads", ()))

    assert sweep(service.store, service.catalogue).writes == 0
    assert left() == 1
    with monkeypatch.context() as patch:  # a policy that doesn't allow it stops nothing else
        patch.setattr(client, "abort_multipart_upload", Mock(side_effect=BotoCoreError))
        assert sweep(service.store, service.catalogue, now=datetime.now(UTC) + 2 * DAY).writes == 0
    assert sweep(service.store, service.catalogue, now=datetime.now(UTC) + 2 * DAY).writes == 1
    assert left() == 0


def test_the_sweep_waits_for_the_second_file_for_as_long_as_its_url_lives(
    service: Service, tmp_path: Path
) -> None:
    key = f"quarantine/{service.tenant_id}/up/adapter_config.json"
    service.store.put(key, b"{}")
    begun, week = datetime.now(UTC), 7 * DAY

    def after(age: timedelta, live: timedelta) -> int:
        seconds = live.total_seconds()
        return sweep(service.store, service.catalogue, urls_live_s=seconds, now=begun + age).uploads

    assert after(week + DAY / 2, week) == 0
    [finding] = check_store(service.store, service.catalogue, tmp_path)
    plans = [
        plan_repairs([finding], can_remake=False, urls_live_s=live, now=begun + 2 * DAY)[0].plan
        for live in (0.0, week.total_seconds())
    ]
    assert plans == ["remove", "leave"]
    assert after(week + 2 * DAY, week) == 1
    assert not service.keys("quarantine/")


def test_a_damaged_pack_is_made_anew_from_its_source(service: Service, tmp_path: Path) -> None:
    version = service.publish("bot", upload(1))
    key = f"tenants/{service.tenant_id}/blobs/{version.digest}/{version.blob}/pack-v1.bin"
    good = service.store.get(key)[0]
    service.store.put(key, good[:-50] + bytes(50))
    service.publisher.repack(service.tenant_id, version.digest)
    assert service.store.get(key)[0] == good
    with pytest.raises(AdapterNotFound):
        service.publisher.repack(service.tenant_id, "0" * 64)
    service.store.put(key.replace("pack-v1.bin", "source.safetensors"), upload(2).weights)
    with pytest.raises(AdapterNotFound, match="damaged"):
        service.publisher.repack(service.tenant_id, version.digest)


def test_abandoned_scratch_folders_are_removed_living_ones_stay(
    store: ObjectStore, tmp_path: Path
) -> None:
    from loraplex.adapter_store.workspace import workspace

    scratch = tmp_path / "scratch"
    (scratch / "ingest-dead").mkdir(parents=True)
    (scratch / "ingest-dead" / ".lock").touch()
    (scratch / "ingest-dead" / "weights").write_bytes(b"x")
    with workspace(scratch) as living:
        Publisher(store, Catalogue(store), BASE, scratch)
        assert list(scratch.iterdir()) == [living]


def test_a_scratch_folder_that_cannot_be_used_is_named(service: Service, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    publisher = Publisher(service.store, service.catalogue, BASE, tmp_path / "file" / "scratch")
    publisher.stage_upload(service.tenant_id, "x", b"{}", b"")
    with pytest.raises(LocalDiskError, match="file/scratch"):
        publisher.ingest(service.tenant_id, "bot", "x")


def test_tenants_share_no_blobs(service: Service, tmp_path: Path) -> None:
    version = service.publish("bot", upload(1))
    other = service.catalogue.create_tenant("other").id
    tier = DiskTier(tmp_path / "disk", service.store, 1 << 20)
    with pytest.raises(NotFound):
        tier.ensure(other, version.digest)


def test_another_base_model_of_the_same_shape_makes_another_digest(
    service: Service, tmp_path: Path
) -> None:
    version = service.publish("bot", upload(1))
    other = BaseModel.from_json(BASE.to_json().replace("ab" * 32, "cd" * 32))
    publisher = Publisher(service.store, service.catalogue, other, tmp_path / "s")
    files = upload(1)
    publisher.stage_upload(service.tenant_id, "x", files.config, files.weights)
    again = publisher.ingest(service.tenant_id, "bot", "x")
    assert again.digest != version.digest


def test_a_rank_beyond_what_the_service_is_set_up_for_is_refused(service, tmp_path):
    publisher = Publisher(service.store, service.catalogue, BASE, tmp_path / "scratch", max_rank=3)
    files = upload(0, rank=4)
    publisher.stage_upload(service.tenant_id, "u", files.config, files.weights)
    with pytest.raises(AdapterRefused, match=r"rank 4, .* at most 3: .*MAX_LORA_RANK") as e:
        publisher.ingest(service.tenant_id, "bot", "u")
    assert e.value.code == "rank_limit"
    assert service.catalogue.adapters(service.tenant_id) == {}
    assert not list(service.store.list(f"tenants/{service.tenant_id}/blobs/"))
