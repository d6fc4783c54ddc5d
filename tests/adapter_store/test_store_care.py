"""`store check | repair | export`: everything wrong is found, and nothing acknowledged is lost."""

from __future__ import annotations

import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from loraplex.adapter_store import (
    AdapterNotFound,
    DiskTier,
    Finding,
    LocalDiskError,
    ObjectStore,
    Pack,
    carry_out,
    check_store,
    export_adapters,
    plan_repairs,
)

from tests.adapter_store.uploads import BASE, Service, upload
from tests.adapters import tiny_base_model

LATER = datetime.now(UTC) + timedelta(days=2)


@pytest.fixture
def service(store: ObjectStore, tmp_path: Path) -> Service:
    return Service(store, tmp_path / "scratch")


def check(service: Service, tmp_path: Path, base=BASE, contents: bool = True) -> list[Finding]:
    found = check_store(
        service.store, service.catalogue, tmp_path / "check", base, contents=contents
    )
    return list(found)


def repair(service: Service, found: list[Finding], now: datetime = LATER) -> list:
    repairs = plan_repairs(found, can_remake=True, now=now)
    return list(carry_out(repairs, service.store, service.catalogue, service.publisher))


def blob_key(service: Service, version, name: str) -> str:
    return f"tenants/{service.tenant_id}/blobs/{version.digest}/{version.blob}/{name}"


def test_a_sound_store_has_no_finding(service: Service, tmp_path: Path) -> None:
    assert check(service, tmp_path) == []
    for i in range(3):
        service.publish(f"bot-{i % 2}", upload(i))
    for base in (None, BASE):
        for contents in (False, True):
            assert check(service, tmp_path, base, contents) == []
    assert not list((tmp_path / "check").iterdir())


def test_every_kind_of_damage_is_found_and_mended_where_that_loses_nothing(
    service: Service, tmp_path: Path
) -> None:
    names = [f"bot-{i}" for i in range(6)]
    versions = {name: service.publish(name, upload(i)) for i, name in enumerate(names)}
    store = service.store
    before = {key: store.get(key)[0] for key in service.keys("")}
    key = {n: {f: blob_key(service, v, f) for f in FILES} for n, v in versions.items()}
    store.delete(key["bot-0"][PACK])
    pack = bytearray(store.get(key["bot-1"][PACK])[0])
    pack[-random.randrange(1, 1000)] ^= 1 << random.randrange(8)
    store.put(key["bot-1"][PACK], bytes(pack))
    store.put(key["bot-2"][PACK], store.get(key["bot-3"][PACK])[0])  # another adapter's
    store.delete(key["bot-3"][SOURCE])
    store.put(key["bot-4"][SOURCE], upload(99).weights)
    store.delete(key["bot-5"][PACK])  # and its source: beyond repair
    store.delete(key["bot-5"][CONFIG])
    orphan = f"tenants/{service.tenant_id}/blobs/{'a' * 64}/{'1' * 16}/pack-v1.bin"
    store.put(orphan, b"x")
    store.put(f"quarantine/{service.tenant_id}/left/adapter_config.json", b"{}")

    found = check(service, tmp_path)
    assert Counter((f.kind, f.digest) for f in found) == Counter(
        [
            ("missing_pack", versions["bot-0"].digest),
            ("damaged_pack", versions["bot-1"].digest),
            ("damaged_pack", versions["bot-2"].digest),
            ("missing_source", versions["bot-3"].digest),
            ("damaged_source", versions["bot-4"].digest),
            ("missing_pack", versions["bot-5"].digest),
            ("missing_source", versions["bot-5"].digest),
            ("orphan_blob", "a" * 64),
            ("abandoned_upload", ""),
        ]
    )
    quick = {(f.kind, f.digest) for f in check(service, tmp_path, contents=False)}
    assert {kind for kind, _ in quick} == {
        *("missing_pack", "missing_source", "orphan_blob", "abandoned_upload")
    }

    # A plan changes nothing, and what is young stays.
    state = {key: store.get(key)[0] for key in service.keys("")}
    young = plan_repairs(found, can_remake=False)
    assert {r.plan for r in young} == {"leave"}
    assert {key: store.get(key)[0] for key in service.keys("")} == state

    done = repair(service, found)
    assert Counter(r.plan for r in done) == {"remake": 3, "remove": 2, "leave": 4}
    for name in ("bot-0", "bot-1", "bot-2"):
        assert store.get(key[name][PACK])[0] == before[key[name][PACK]]
    assert orphan not in service.keys("")
    assert not service.keys("quarantine/")
    assert {f.kind for f in check(service, tmp_path)} == {
        *("missing_source", "damaged_source", "missing_pack")
    }
    # All that can be served is, and nothing that a catalogue names was taken away.
    tier = DiskTier(tmp_path / "disk", store, 1 << 22)
    for name in names[:5]:
        tier.ensure(service.tenant_id, versions[name].digest)
    assert service.keys("") >= set(before) - {
        key["bot-5"][PACK], key["bot-5"][CONFIG], key["bot-3"][SOURCE]
    }  # fmt: skip


def test_an_orphan_that_a_version_names_by_now_is_not_removed(
    service: Service, tmp_path: Path
) -> None:
    version = service.publish("bot", upload(1))
    kept = service.keys("")
    stale = Finding(
        "orphan_blob",
        service.tenant_id,
        blob_key(service, version, ""),
        "as seen before the publish",
        version.digest,
        version.blob,
        datetime.now(UTC),
    )
    assert repair(service, [stale])[0].plan == "remove"
    assert service.keys("") == kept


def test_a_half_deleted_tenant_is_found_and_its_deletion_ended(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.publish("bot", upload(1))
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "delete_all", lambda self, keys: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            service.catalogue.delete_tenant(service.tenant_id)
    found = check(service, tmp_path)
    assert [f.kind for f in found] == ["half_deleted"]
    repair(service, found)
    assert check(service, tmp_path) == []
    assert not service.keys("tenants/")


def test_documents_that_cant_be_read_are_told_and_left(service: Service, tmp_path: Path) -> None:
    service.publish("bot", upload(1))
    other = service.catalogue.create_tenant("other").id
    service.store.put(f"tenants/{other}/tenant.json", b"{")
    service.store.put(f"tenants/{service.tenant_id}/catalogue.json", b"[]")
    kept = service.keys("")
    found = check(service, tmp_path)
    assert [f.kind for f in found] == ["unreadable_document"] * 2
    assert other in found[0].message
    assert service.tenant_id in found[1].key
    assert {r.plan for r in repair(service, found)} == {"leave"}
    assert service.keys("") == kept


def test_adapters_of_another_base_model_are_told_and_left(service: Service, tmp_path: Path) -> None:
    service.publish("bot", upload(1))
    other = type(BASE).from_json(BASE.to_json().replace("ab" * 32, "cd" * 32))
    found = check(service, tmp_path, other)
    assert [f.kind for f in found] == ["other_base"]
    assert [r.plan for r in repair(service, found)] == ["leave"]
    assert tiny_base_model() == BASE


def test_an_export_gives_back_the_uploaded_files(service: Service, tmp_path: Path) -> None:
    files = [upload(i) for i in range(3)]
    service.publish("bot", files[0])
    latest = service.publish("bot", files[1])
    service.publish("cat", files[2])
    target = tmp_path / "out"

    def export(*names: str, **options: bool) -> set[str]:
        where = export_adapters(
            service.store, service.catalogue, service.tenant_id, target, names, **options
        )
        return {path.name for path in where}

    assert export() == {"bot", "cat"}
    for name, wanted in (("bot", files[1]), ("cat", files[2])):
        assert (target / name / "adapter_model.safetensors").read_bytes() == wanted.weights
        assert (target / name / "adapter_config.json").read_bytes() == wanted.config
    assert export("bot", all_versions=True) == {"bot@1", "bot@2"}
    assert (target / "bot@1/adapter_model.safetensors").read_bytes() == files[0].weights
    assert export("bot", packs=True) == {"bot@2.pack"}
    assert Pack.open(target / "bot@2.pack").digest == latest.digest
    with pytest.raises(LocalDiskError, match="already"):
        export("cat")
    with pytest.raises(AdapterNotFound, match=r"dog.*bot, cat"):
        export("dog")
    assert not [p for p in target.iterdir() if p.name.startswith(".")]


PACK, SOURCE, CONFIG = FILES = ("pack-v1.bin", "source.safetensors", "adapter_config.json")
