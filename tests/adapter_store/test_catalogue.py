"""Tenants, keys and adapters: who may call, and what names stand for."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from loraplex.adapter_store import (
    AdapterNotFound,
    BlobNeeded,
    Catalogue,
    InvalidName,
    KeyNotFound,
    LimitExceeded,
    ObjectStore,
    StoreUnavailable,
    TenantExists,
    TenantLimits,
    TenantNotFound,
)

from tests.adapter_store.faults import FaultyStore
from tests.adapter_store.uploads import META


@pytest.fixture
def catalogue(store: ObjectStore) -> Catalogue:
    return Catalogue(store)


@pytest.fixture
def tenant_id(catalogue: Catalogue) -> str:
    return catalogue.create_tenant("acme").id


def digest(i: int) -> str:
    return hashlib.sha256(b"%d" % i).hexdigest()


# Tenants


def test_tenants_come_and_go(catalogue: Catalogue, store: ObjectStore) -> None:
    limits = TenantLimits(requests_per_minute=10, max_adapters=2, weight=2.5)
    acme = catalogue.create_tenant("acme", limits)
    other = catalogue.create_tenant("other")
    assert catalogue.get_tenant(acme.id) == acme
    assert acme.limits == limits
    assert other.limits == TenantLimits()
    assert sorted(t.name for t in catalogue.list_tenants()) == ["acme", "other"]
    changed = catalogue.update_tenant(acme.id, limits=TenantLimits(tokens_per_minute=5))
    assert changed.limits.requests_per_minute is None
    assert catalogue.get_tenant(acme.id) == changed
    catalogue.delete_tenant(acme.id)
    assert [t.name for t in catalogue.list_tenants()] == ["other"]
    assert not [o.key for o in store.list("") if acme.id in o.key]


def test_deleting_a_tenant_leaves_nothing_that_works(
    catalogue: Catalogue, store: ObjectStore, tenant_id: str
) -> None:
    _, key = catalogue.create_key(tenant_id)
    catalogue.publish(tenant_id, "bot", digest(1), META, "blob")
    store.put(f"tenants/{tenant_id}/blobs/{digest(1)}/blob/pack-v1.bin", b"x")
    store.put(f"quarantine/{tenant_id}/u/adapter_config.json", b"x")
    catalogue.delete_tenant(tenant_id)
    assert catalogue.find_key(key) is None
    left = {o.key for o in store.list("")}
    assert left == {"auth/generation.json", "names/acme.json"}
    for ask in (
        lambda: catalogue.get_tenant(tenant_id),
        lambda: catalogue.adapters(tenant_id),
        lambda: catalogue.resolve(tenant_id, "bot"),
        lambda: catalogue.publish(tenant_id, "bot", digest(1), META, "b2"),
        lambda: catalogue.create_key(tenant_id),
        lambda: catalogue.list_keys(tenant_id),
        lambda: catalogue.update_tenant(tenant_id, limits=TenantLimits()),
        lambda: catalogue.delete_tenant(tenant_id),
    ):
        with pytest.raises(TenantNotFound, match=tenant_id):
            ask()
    assert {o.key for o in store.list("")} == left
    assert catalogue.create_tenant("acme").id != tenant_id


def test_names_of_tenants_are_unique_also_in_a_race(catalogue: Catalogue) -> None:
    def make(_: int) -> bool:
        try:
            catalogue.create_tenant("acme")
        except TenantExists:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(make, range(8))).count(True) == 1
    assert len(catalogue.list_tenants()) == 1


@pytest.mark.parametrize("name", ["", "Acme", "a b", "a/b", "../x", "a..b", "-a", "x" * 64, "a@1"])
def test_names_outside_the_alphabet(catalogue: Catalogue, name: str) -> None:
    with pytest.raises(InvalidName, match="a-z"):
        catalogue.create_tenant(name)


@pytest.mark.parametrize("tenant_id", ["", "..", "../x", "a/b", "t-" + "0" * 99, "t-é"])
def test_ids_that_are_none(catalogue: Catalogue, tenant_id: str) -> None:
    for ask in (catalogue.get_tenant, catalogue.adapters, catalogue.delete_tenant):
        with pytest.raises(TenantNotFound):
            ask(tenant_id)


@pytest.mark.parametrize("step", range(4))
def test_a_name_is_free_again_when_its_makers_died(store: ObjectStore, step: int) -> None:
    """Whichever write of the creation was the last one."""
    now = 1000.0
    faulty = FaultyStore(store)
    faulty.fail = die_after(step)
    with pytest.raises(Died):
        Catalogue(faulty, lambda: now).create_tenant("acme")
    exists = bool(Catalogue(store).list_tenants())
    assert exists == (step == 3)  # its document is the last but one write
    if 0 < step < 3:
        with pytest.raises(TenantExists):  # for all that is known, they live
            Catalogue(store, lambda: now + 59).create_tenant("acme")
    later = Catalogue(store, lambda: now + 61)
    if exists:
        with pytest.raises(TenantExists):
            later.create_tenant("acme")
    else:
        assert later.create_tenant("acme").name == "acme"


@pytest.mark.parametrize("step", range(9))
def test_a_deletion_that_broke_off_can_be_ended(store: ObjectStore, step: int) -> None:
    catalogue = Catalogue(store)
    tenant = catalogue.create_tenant("acme")
    _, key = catalogue.create_key(tenant.id)
    catalogue.publish(tenant.id, "bot", digest(1), META, "blob")
    store.put(f"tenants/{tenant.id}/blobs/{digest(1)}/blob/pack-v1.bin", b"x")
    faulty = FaultyStore(store)
    faulty.fail = die_after(step)
    try:
        Catalogue(faulty).delete_tenant(tenant.id)
    except Died:
        if step == 0:
            assert catalogue.find_key(key) is not None  # nothing has happened
        else:
            assert catalogue.list_tenants() == []
            with pytest.raises(TenantNotFound):
                catalogue.get_tenant(tenant.id)
        if step > 1:
            assert catalogue.find_key(key) is None
        if store_has(store, f"tenants/{tenant.id}/tenant.json"):
            assert catalogue.half_deleted_tenants() == ([tenant.id] if step else [])
            catalogue.delete_tenant(tenant.id)
    assert not [o.key for o in store.list("") if tenant.id in o.key]
    assert catalogue.find_key(key) is None
    catalogue.create_tenant("acme")


# Keys


def test_keys_open_their_tenant_until_revoked(
    catalogue: Catalogue, store: ObjectStore, tenant_id: str
) -> None:
    key_id, key = catalogue.create_key(tenant_id, "laptop")
    other_id, other = catalogue.create_key(tenant_id)
    assert re.fullmatch(r"lpx-[A-Za-z0-9_-]{43}", key)
    record = catalogue.find_key(key)
    assert record is not None
    assert (record.key_id, record.tenant_id, record.label) == (key_id, tenant_id, "laptop")
    assert not record.admin
    assert {k.key_id for k in catalogue.list_keys(tenant_id)} == {key_id, other_id}
    catalogue.revoke_key(tenant_id, key_id)
    assert catalogue.find_key(key) is None
    assert catalogue.find_key(other) is not None
    assert [k.key_id for k in catalogue.list_keys(tenant_id)] == [other_id]
    with pytest.raises(KeyNotFound):
        catalogue.revoke_key(tenant_id, key_id)


def test_the_store_never_holds_a_key(
    catalogue: Catalogue, store: ObjectStore, tenant_id: str
) -> None:
    keys = [catalogue.create_key(tenant_id)[1], catalogue.ensure_admin_key()]
    everything = b"".join(store.get(o.key)[0] + o.key.encode() for o in store.list(""))
    for key in keys:
        assert key is not None
        assert key.encode() not in everything
        assert key.encode().removeprefix(b"lpx-")[:20] not in everything


@pytest.mark.parametrize(
    "key", ["", "lpx-", "sk-" + "a" * 43, "lpx-" + "a" * 42, "lpx-" + "../" * 14 + "a", "lpx-é"]
)
def test_what_is_no_key_costs_no_read(key: str, store: ObjectStore) -> None:
    faulty = FaultyStore(store)
    faulty.fail = lambda action, name: True
    assert Catalogue(faulty).find_key(key) is None
    with pytest.raises(StoreUnavailable):
        Catalogue(faulty).find_key("lpx-" + "a" * 43)


def test_unknown_keys_open_nothing(catalogue: Catalogue, tenant_id: str) -> None:
    _, key = catalogue.create_key(tenant_id)
    changed = key[:-1] + ("A" if key[-1] != "A" else "B")
    assert catalogue.find_key(changed) is None


def test_a_key_made_while_its_tenant_is_deleted_does_not_work(store: ObjectStore) -> None:
    """The deletion comes between the two writes of the creation."""
    catalogue, faulty = Catalogue(store), FaultyStore(store)
    tenant = catalogue.create_tenant("acme")

    def delete_first(key: str) -> None:
        if key.startswith("keys/"):
            catalogue.delete_tenant(tenant.id)

    faulty.before_put = delete_first
    with pytest.raises(TenantNotFound):
        Catalogue(faulty).create_key(tenant.id)
    assert not list(store.list("keys/"))


def test_there_is_one_admin_key(catalogue: Catalogue) -> None:
    with ThreadPoolExecutor(6) as threads:
        made = [k for k in threads.map(lambda _: catalogue.ensure_admin_key(), range(6)) if k]
    assert len(made) == 1
    assert catalogue.ensure_admin_key() is None
    record = catalogue.find_key(made[0])
    assert record is not None
    assert record.admin
    newer = catalogue.ensure_admin_key(rotate=True)
    assert newer is not None
    assert catalogue.find_key(made[0]) is None
    assert catalogue.find_key(newer) is not None


def test_a_rotated_admin_key_is_dead_also_when_its_record_stays(store: ObjectStore) -> None:
    faulty = FaultyStore(store)
    old = Catalogue(store).ensure_admin_key()
    faulty.fail = lambda action, key: action == "delete"
    with pytest.raises(StoreUnavailable):
        Catalogue(faulty).ensure_admin_key(rotate=True)
    assert old is not None
    assert Catalogue(store).find_key(old) is None


# Adapters


def test_versions_count_up_and_aliases_move(catalogue: Catalogue, tenant_id: str) -> None:
    versions = [catalogue.publish(tenant_id, "bot", digest(i), META, f"b{i}") for i in range(3)]
    assert [v.version for v in versions] == [1, 2, 3]
    assert catalogue.resolve(tenant_id, "bot") == versions[2]
    assert catalogue.resolve(tenant_id, "bot@1") == versions[0]
    assert catalogue.rollback(tenant_id, "bot") == versions[1]
    assert catalogue.resolve(tenant_id, "bot") == versions[1]
    assert catalogue.rollback(tenant_id, "bot", 3) == versions[2]
    assert catalogue.rollback(tenant_id, "bot", 1) == versions[0]
    with pytest.raises(AdapterNotFound, match="before 1"):
        catalogue.rollback(tenant_id, "bot")
    newest = catalogue.publish(tenant_id, "bot", digest(9), META, "b9")
    assert newest.version == 4
    alias = catalogue.adapters(tenant_id)["bot"]
    assert alias.current == newest
    assert [v.version for v in alias.versions] == [1, 2, 3, 4]


def test_publishing_the_current_digest_again_changes_nothing(
    catalogue: Catalogue, store: ObjectStore, tenant_id: str
) -> None:
    first = catalogue.publish(tenant_id, "bot", digest(1), META, "b1")
    generation, etag = (
        catalogue.generation(),
        store.head(f"tenants/{tenant_id}/catalogue.json").etag,
    )
    assert catalogue.publish(tenant_id, "bot", digest(1), META, "b2") == first
    assert catalogue.generation() == generation
    assert store.head(f"tenants/{tenant_id}/catalogue.json").etag == etag


def test_a_digest_that_the_tenant_has_needs_no_other_blob(
    catalogue: Catalogue, tenant_id: str
) -> None:
    with pytest.raises(BlobNeeded):
        catalogue.publish(tenant_id, "bot", digest(1), META)
    catalogue.publish(tenant_id, "bot", digest(1), META, "b1")
    twin = catalogue.publish(tenant_id, "twin", digest(1), META, "b2")
    assert twin.blob == "b1"
    other = catalogue.create_tenant("other").id
    with pytest.raises(BlobNeeded):  # tenants share nothing
        catalogue.publish(other, "bot", digest(1), META)


def test_numbers_of_a_deleted_name_are_not_given_again(
    catalogue: Catalogue, tenant_id: str
) -> None:
    for i in range(3):
        catalogue.publish(tenant_id, "bot", digest(i), META, f"b{i}")
    catalogue.publish(tenant_id, "other", digest(5), META, "b5")
    catalogue.delete_adapter(tenant_id, "bot")
    assert set(catalogue.adapters(tenant_id)) == {"other"}
    again = catalogue.publish(tenant_id, "bot", digest(0), META, "b10")
    assert again.version == 4
    for version in (1, 2, 3):
        with pytest.raises(AdapterNotFound, match="its versions: 4"):
            catalogue.resolve(tenant_id, f"bot@{version}")
    assert catalogue.publish(tenant_id, "fresh", digest(6), META, "b6").version == 1


def test_names_that_are_not_there(catalogue: Catalogue, tenant_id: str) -> None:
    for ask in (
        lambda: catalogue.resolve(tenant_id, "bot"),
        lambda: catalogue.rollback(tenant_id, "bot"),
        lambda: catalogue.delete_adapter(tenant_id, "bot"),
    ):
        with pytest.raises(AdapterNotFound, match="'bot'"):
            ask()
    for name in ("Bot", "bot@", "bot@0", "bot@x", "a/b", ""):
        with pytest.raises(InvalidName):
            catalogue.resolve(tenant_id, name)
    with pytest.raises(InvalidName):
        catalogue.publish(tenant_id, "bot@2", digest(1), META, "b")


def test_concurrent_publishes_all_count(catalogue: Catalogue, tenant_id: str) -> None:
    """Eight threads, each publishing under a name of its own and under one that all share."""

    def publish(i: int) -> list[int]:
        catalogue.publish(tenant_id, f"own-{i}", digest(i), META, f"b{i}")
        return [
            catalogue.publish(
                tenant_id, "shared", digest(100 + 3 * i + j), META, f"s{i}{j}"
            ).version
            for j in range(3)
        ]

    with ThreadPoolExecutor(8) as threads:
        versions = [v for got in threads.map(publish, range(8)) for v in got]
    assert sorted(versions) == list(range(1, 25))
    adapters = catalogue.adapters(tenant_id)
    assert set(adapters) == {"shared", *(f"own-{i}" for i in range(8))}
    assert {v.digest for v in adapters["shared"].versions} == {digest(100 + i) for i in range(24)}
    assert adapters["shared"].current_version == 24


def test_limits_hold_also_in_a_race(catalogue: Catalogue) -> None:
    limits = TenantLimits(max_adapters=3)
    tenant = catalogue.create_tenant("small", limits)

    def publish(i: int) -> str | None:
        try:
            catalogue.publish(tenant.id, f"bot-{i}", digest(i), META, f"b{i}")
        except LimitExceeded as error:
            return error.limit
        return None

    with ThreadPoolExecutor(8) as threads:
        refused = [r for r in threads.map(publish, range(8)) if r]
    assert refused == ["max_adapters"] * 5
    assert len(catalogue.adapters(tenant.id)) == 3
    name = next(iter(catalogue.adapters(tenant.id)))
    catalogue.publish(tenant.id, name, digest(77), META, "b77")  # a new version is no new adapter


def test_bytes_are_counted_once_per_digest(catalogue: Catalogue) -> None:
    tenant = catalogue.create_tenant("small", TenantLimits(max_bytes=2 * META.nbytes))
    catalogue.publish(tenant.id, "a", digest(1), META, "b1")
    catalogue.publish(tenant.id, "b", digest(1), META, "b1")
    catalogue.publish(tenant.id, "a", digest(2), META, "b2")
    with pytest.raises(LimitExceeded, match=r"3000 bytes.*2000 are allowed") as caught:
        catalogue.publish(tenant.id, "a", digest(3), META, "b3")
    assert caught.value.limit == "max_bytes"


def test_every_change_moves_the_generation(catalogue: Catalogue) -> None:
    seen = [catalogue.generation()]
    assert catalogue.generation() == seen[0] == ""

    def moved(change: Callable[[], object]) -> object:
        result = change()
        now = catalogue.generation()
        assert now not in seen
        assert now == catalogue.generation() == Catalogue(catalogue.store).generation()
        seen.append(now)
        return result

    tenant = moved(lambda: catalogue.create_tenant("acme"))
    moved(lambda: catalogue.update_tenant(tenant.id, limits=TenantLimits(max_adapters=9)))
    key_id, _ = moved(lambda: catalogue.create_key(tenant.id))
    moved(lambda: catalogue.revoke_key(tenant.id, key_id))
    moved(lambda: catalogue.publish(tenant.id, "bot", digest(1), META, "b1"))
    moved(lambda: catalogue.publish(tenant.id, "bot", digest(2), META, "b2"))
    moved(lambda: catalogue.rollback(tenant.id, "bot"))
    moved(lambda: catalogue.delete_adapter(tenant.id, "bot"))
    moved(lambda: catalogue.ensure_admin_key())
    moved(lambda: catalogue.ensure_admin_key(rotate=True))
    moved(lambda: catalogue.delete_tenant(tenant.id))


def test_old_versions_are_forgotten_but_never_the_current_one(
    catalogue: Catalogue, store: ObjectStore, tenant_id: str
) -> None:
    for i in range(53):
        version = catalogue.publish(tenant_id, "bot", digest(i), META, f"b{i}")
        if i == 0:
            store.put(f"tenants/{tenant_id}/blobs/{digest(0)}/b0/pack-v1.bin", b"x")
    alias = catalogue.adapters(tenant_id)["bot"]
    assert [v.version for v in alias.versions] == list(range(4, 54))
    assert alias.current == version
    assert not list(store.list(f"tenants/{tenant_id}/blobs/"))


# Helpers


class Died(BaseException):
    """The process ends here: nothing catches it."""


def die_after(changes: int) -> Callable[[str, str], bool]:
    """A fault that lets this many writes and deletes pass."""
    left = [changes]
    lock = threading.Lock()

    def fail(action: str, key: str) -> bool:
        if action in ("put", "delete", "upload"):
            with lock:
                left[0] -= 1
                if left[0] < 0:
                    raise Died
        return False

    return fail


def store_has(store: ObjectStore, key: str) -> bool:
    return any(o.key == key for o in store.list(key))
