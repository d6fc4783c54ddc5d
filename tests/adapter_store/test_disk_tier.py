"""The disk tier: whole, verified packs or none, whoever dies and whatever rots."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from loraplex.adapter_store import (
    AdapterCorrupt,
    AdapterNotFound,
    DiskTier,
    EmbeddedS3,
    LocalDiskError,
    NotFound,
    ObjectStore,
    Pack,
    PackPin,
    PackVersionError,
    Repacker,
    StoreUnavailable,
)

from tests.adapter_store.faults import FaultyStore
from tests.adapter_store.stored_packs import MIB, TENANT, pack_key, store_pack
from tests.adapter_store.uploads import BASE, Service, upload


@pytest.fixture
def service(store: ObjectStore, tmp_path: Path) -> Service:
    return Service(store, tmp_path / "scratch")


@pytest.fixture
def faulty(store: ObjectStore) -> FaultyStore:
    return FaultyStore(store)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def digests(service: Service, count: int) -> list[str]:
    """Published adapters; all packs are of one size."""
    return [service.publish(f"bot-{i}", upload(1000 + i)).digest for i in range(count)]


def flip_bit(path: Path, offset: int = -20) -> None:
    """As a disk does it: the file's times don't tell."""
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_pack_comes_from_the_store_once(
    service: Service, faulty: FaultyStore, folder: Path
) -> None:
    [digest] = digests(service, 1)
    tier = DiskTier(folder, faulty, 1 << 20)
    assert tier.resident() == {}
    path, source = tier.ensure(service.tenant_id, digest)
    assert source == "s3"
    assert Pack.open(path).digest == digest
    assert tier.ensure(service.tenant_id, digest) == (path, "disk")
    assert tier.resident() == {f"{service.tenant_id}/{digest}": path.stat().st_size}
    assert len(faulty.downloads) == 1
    tier.remove(f"{service.tenant_id}/{digest}")
    tier.remove(f"{service.tenant_id}/{digest}")
    assert tier.resident() == {}
    assert tier.ensure(service.tenant_id, digest)[1] == "s3"


def test_files_stay_over_a_restart_and_serve_without_the_store(
    service: Service, faulty: FaultyStore, folder: Path
) -> None:
    [digest] = digests(service, 1)
    path, _ = DiskTier(folder, faulty, 1 << 20).ensure(service.tenant_id, digest)
    faulty.fail = lambda action, key: True
    again = DiskTier(folder, faulty, 1 << 20)
    assert again.ensure(service.tenant_id, digest) == (path, "disk")
    with pytest.raises(StoreUnavailable):
        again.ensure(service.tenant_id, "0" * 64)


def test_unknown_adapters(service: Service, folder: Path) -> None:
    tier = DiskTier(folder, service.store, 1 << 20)
    with pytest.raises(NotFound):
        tier.ensure(service.tenant_id, "0" * 64)
    for tenant_id, digest in (("..", "0" * 64), (service.tenant_id, "../x"), ("a/b", "0")):
        with pytest.raises((NotFound, ValueError)):
            tier.ensure(tenant_id, digest)
    assert tier.resident() == {}


def test_threads_that_ask_for_one_pack_share_one_download(
    service: Service, faulty: FaultyStore, folder: Path
) -> None:
    wanted = digests(service, 2)
    faulty.download_delay_s = 0.3
    tier = DiskTier(folder, faulty, 1 << 20)
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda i: tier.ensure(service.tenant_id, wanted[i % 2]), range(8)))
    assert len(faulty.downloads) == 2
    assert len(set(got)) == 2


def test_processes_that_ask_for_one_pack_share_one_download(
    service: Service, faulty: FaultyStore, folder: Path
) -> None:
    """Two tiers on one folder, as two worker groups of one node have."""
    [digest] = digests(service, 1)
    faulty.download_delay_s = 0.3
    tiers = [DiskTier(folder, faulty, 1 << 20) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        got = list(threads.map(lambda tier: tier.ensure(service.tenant_id, digest), tiers))
    assert len(faulty.downloads) == 1
    assert sorted(source for _, source in got) == ["disk", "disk", "s3"]


def test_a_failed_fetch_fails_all_who_wait_and_the_next_one_tries_again(
    service: Service, faulty: FaultyStore, folder: Path
) -> None:
    [digest] = digests(service, 1)
    tier = DiskTier(folder, faulty, 1 << 20)
    faulty.fail = lambda action, key: action == "download"
    with pytest.raises(StoreUnavailable):
        tier.ensure(service.tenant_id, digest)
    faulty.fail = lambda action, key: False
    assert tier.ensure(service.tenant_id, digest)[1] == "s3"


@pytest.mark.parametrize("how", ["header", "data", "another"])
def test_a_part_that_is_damaged_on_its_way_is_fetched_again_once(
    service: Service, faulty: FaultyStore, folder: Path, how: str
) -> None:
    digest, other = digests(service, 2)
    tier = DiskTier(folder, faulty, 1 << 20)
    path, _ = tier.ensure(service.tenant_id, other)
    faulty.parts.clear()

    def damage(start: int, view: memoryview, times: int) -> None:
        if len(faulty.parts) > times:
            return
        if how == "header":
            view[40] ^= 4
        elif how == "data":
            view[-20] ^= 4
        else:
            view[:] = path.read_bytes()[start:]

    faulty.damage = lambda key, start, view: damage(start, view, 1)
    found, source = tier.ensure(service.tenant_id, digest)
    assert (source, len(faulty.parts)) == ("s3", 2)
    assert Pack.open(found).digest == digest

    tier.remove(f"{service.tenant_id}/{digest}")
    faulty.parts.clear()
    faulty.damage = lambda key, start, view: damage(start, view, 2)
    with pytest.raises(AdapterCorrupt, match=digest):
        tier.ensure(service.tenant_id, digest)
    assert len(faulty.parts) == 2
    assert set(tier.resident()) == {f"{service.tenant_id}/{other}"}
    assert hidden(folder) == []


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "another"])
def test_a_damaged_blob_is_an_error_for_its_adapter_alone(
    service: Service, folder: Path, how: str
) -> None:
    version, other = (service.publish(f"bot-{i}", upload(i)) for i in range(2))
    key, other_key = (
        f"tenants/{service.tenant_id}/blobs/{v.digest}/{v.blob}/pack-v1.bin"
        for v in (version, other)
    )
    good = service.store.get(key)[0]
    bad = {
        "truncated": good[:-1000],
        "empty": b"",
        "flipped": good[:-20] + bytes([good[-20] ^ 1]) + good[-19:],
        "another": service.store.get(other_key)[0],
    }[how]
    service.store.put(key, bad)
    tier = DiskTier(folder, service.store, 1 << 20)
    with pytest.raises(AdapterCorrupt, match=f"{version.digest}.*publish the adapter again"):
        tier.ensure(service.tenant_id, version.digest)
    assert tier.ensure(service.tenant_id, other.digest)[1] == "s3"
    assert hidden(folder) == []
    service.publisher.repack(service.tenant_id, version.digest)
    assert tier.ensure(service.tenant_id, version.digest)[0].read_bytes() == good


@pytest.mark.parametrize("offset", [3, 40, 4500, -20])
def test_a_bit_that_flips_on_the_disk_is_found_at_the_next_start(
    service: Service, faulty: FaultyStore, folder: Path, offset: int
) -> None:
    [digest] = digests(service, 1)
    path, _ = DiskTier(folder, faulty, 1 << 20).ensure(service.tenant_id, digest)
    good = path.read_bytes()
    flip_bit(path, offset)
    faulty.downloads.clear()
    found, source = DiskTier(folder, faulty, 1 << 20).ensure(service.tenant_id, digest)
    assert (source, len(faulty.downloads)) == ("s3", 1)
    assert found.read_bytes() == good


def test_a_file_that_is_replaced_while_we_run_is_checked_again(
    service: Service, faulty: FaultyStore, folder: Path
) -> None:
    [digest] = digests(service, 1)
    tier = DiskTier(folder, faulty, 1 << 20)
    path, _ = tier.ensure(service.tenant_id, digest)
    os.truncate(path, 5000)
    assert tier.ensure(service.tenant_id, digest) == (path, "s3")
    assert Pack.open(path).digest == digest


def test_the_least_recently_wanted_go_first(service: Service, folder: Path) -> None:
    a, b, c, d = digests(service, 4)
    probe = DiskTier(folder / "probe", service.store, 1 << 30)
    nbytes = probe.ensure(service.tenant_id, a)[0].stat().st_size
    tier = DiskTier(folder / "tier", service.store, 3 * nbytes)

    def want(digest: str) -> None:
        tier.ensure(service.tenant_id, digest)
        time.sleep(0.02)  # file times tick in milliseconds

    for digest in (a, b, c, a):
        want(digest)
    want(d)
    assert set(tier.resident()) == {f"{service.tenant_id}/{x}" for x in (a, c, d)}
    want(b)
    assert set(tier.resident()) == {f"{service.tenant_id}/{x}" for x in (a, d, b)}
    assert sum(tier.resident().values()) <= 3 * nbytes


def test_pinned_packs_stay_also_against_other_processes(service: Service, folder: Path) -> None:
    a, b, c = digests(service, 3)
    key_a = f"{service.tenant_id}/{a}"
    probe = DiskTier(folder / "probe", service.store, 1 << 30)
    nbytes = probe.ensure(service.tenant_id, a)[0].stat().st_size
    holder = DiskTier(folder / "tier", service.store, 2 * nbytes)
    other = DiskTier(folder / "tier", service.store, 2 * nbytes)
    path, _ = holder.ensure(service.tenant_id, a)
    with PackPin(path), PackPin(path):
        for digest in (b, c, b):
            other.ensure(service.tenant_id, digest)
            assert key_a in other.resident()
        other.remove(key_a)
        assert key_a in other.resident()
    time.sleep(0.02)
    other.ensure(service.tenant_id, c)
    assert key_a not in other.resident()
    with pytest.raises(FileNotFoundError):
        PackPin(path)
    other.remove(key_a)
    other.remove(f"{service.tenant_id}/{c}")
    assert set(other.resident()) == {f"{service.tenant_id}/{b}"}


def test_a_fetch_waits_for_a_pin_to_end(service: Service, folder: Path) -> None:
    a, b = digests(service, 2)
    probe = DiskTier(folder / "probe", service.store, 1 << 30)
    nbytes = probe.ensure(service.tenant_id, a)[0].stat().st_size
    tier = DiskTier(folder / "tier", service.store, nbytes)
    pin = PackPin(tier.ensure(service.tenant_id, a)[0])
    with ThreadPoolExecutor(1) as threads:
        fetch = threads.submit(tier.ensure, service.tenant_id, b)
        with pytest.raises(TimeoutError):
            fetch.result(0.3)
        assert set(tier.resident()) == {f"{service.tenant_id}/{a}"}
        pin.close()
        assert fetch.result(10)[1] == "s3"


def test_no_room_is_an_error_that_names_the_folder(
    service: Service, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = digests(service, 2)
    small = DiskTier(folder / "small", service.store, 1000)
    with pytest.raises(LocalDiskError, match=r"1000 bytes.*small"):
        small.ensure(service.tenant_id, a)
    probe = DiskTier(folder / "probe", service.store, 1 << 30)
    nbytes = probe.ensure(service.tenant_id, a)[0].stat().st_size
    tier = DiskTier(folder / "full", service.store, nbytes)
    monkeypatch.setattr("loraplex.adapter_store.disk_tier._PINNED_S", 0.1)
    with (
        PackPin(tier.ensure(service.tenant_id, a)[0]),
        pytest.raises(LocalDiskError, match="in use"),
    ):
        tier.ensure(service.tenant_id, b)
    assert hidden(folder) == []
    (folder / "file").touch()
    with pytest.raises(LocalDiskError, match="file/disk"):
        DiskTier(folder / "file" / "disk", service.store, 1 << 20)


SLOW_FETCH = """
    import sys, threading, time
    from pathlib import Path
    from loraplex.adapter_store import DiskTier, ObjectStore, pack_download

    url, endpoint, access_key, secret_key, folder, tenant_id, digest = sys.argv[1:]
    pack_download.PART_BYTES = 1 << 20
    store = ObjectStore(url, endpoint=endpoint, access_key=access_key, secret_key=secret_key)
    read_into = store.read_into
    parts, lock = 0, threading.Lock()

    def slow(key, etag, start, view):
        global parts
        with lock:
            number, parts = parts, parts + 1
        if number == 5:
            view[: len(view) // 2] = bytes(len(view) // 2)  # a half-written part
            time.sleep(0.5)  # the first five are there by then
            print("half", flush=True)
        if number >= 5:
            time.sleep(60)
        read_into(key, etag, start, view)

    store.read_into = slow
    DiskTier(Path(folder), store, 1 << 26).ensure(tenant_id, digest)
"""


def test_what_a_killed_process_was_fetching_is_taken_up_again(
    store: ObjectStore,
    faulty: FaultyStore,
    s3_server: EmbeddedS3,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loraplex.adapter_store.pack_download.PART_BYTES", MIB)
    digest = store_pack(store, folder / "made", 1, mib=12)
    arguments = [
        store.url,
        s3_server.endpoint,
        s3_server.access_key,
        s3_server.secret_key,
        str(folder),
        TENANT,
        digest,
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW_FETCH), *arguments], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"half\n"
    assert len(hidden(folder)) == 2  # the file and its journal
    # A second user of the folder leaves a living writer's file alone.
    tier = DiskTier(folder, faulty, 1 << 26)
    tier.remove(f"{TENANT}/{digest}")
    assert len(hidden(folder)) == 2
    assert tier.resident() == {}
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert tier.resident() == {}
    path, source = DiskTier(folder, faulty, 1 << 26).ensure(TENANT, digest)
    assert source == "s3"
    assert len(faulty.parts) <= 8  # of 12 parts and the head
    assert path.read_bytes() == store.get(pack_key(digest))[0]
    assert hidden(folder) == []


def test_a_partial_file_that_nobody_takes_up_goes_after_a_day(
    store: ObjectStore, faulty: FaultyStore, folder: Path
) -> None:
    digest = store_pack(store, folder / "made", 1, mib=2)
    tier = DiskTier(folder, faulty, 1 << 26)
    faulty.fail = lambda action, key: len(faulty.parts) == 1
    with pytest.raises(StoreUnavailable):
        tier.ensure(TENANT, digest)
    DiskTier(folder, store, 1 << 26)
    assert len(hidden(folder)) == 2
    for path in hidden(folder):
        os.utime(path, (time.time() - 90000, time.time() - 90000))
    DiskTier(folder, store, 1 << 26)
    assert hidden(folder) == []


def test_a_partial_file_makes_room_before_a_pack_does(
    store: ObjectStore, faulty: FaultyStore, folder: Path
) -> None:
    a, b, c = (store_pack(store, folder / "made", n, mib=1) for n in range(3))
    tier = DiskTier(folder, faulty, int(2.5 * MIB))
    tier.ensure(TENANT, a)
    faulty.fail = lambda action, key: b in key and action == "download"
    with pytest.raises(StoreUnavailable):
        tier.ensure(TENANT, b)
    assert len(hidden(folder)) == 2
    tier.ensure(TENANT, c)
    assert hidden(folder) == []
    assert set(tier.resident()) == {f"{TENANT}/{a}", f"{TENANT}/{c}"}


def test_a_clock_that_was_set_back_keeps_no_partial_file(
    store: ObjectStore, faulty: FaultyStore, folder: Path
) -> None:
    a, b = (store_pack(store, folder / "made", n, mib=1) for n in range(2))
    tier = DiskTier(folder, faulty, int(1.5 * MIB))
    faulty.fail = lambda action, key: a in key and action == "download"
    with pytest.raises(StoreUnavailable):
        tier.ensure(TENANT, a)
    for path in hidden(folder):
        os.utime(path, (time.time() + 90000, time.time() + 90000))
    tier.ensure(TENANT, b)
    assert hidden(folder) == []


@pytest.mark.parametrize("to", ["the same key", "another key"])
def test_parts_of_two_objects_never_mix(
    store: ObjectStore,
    faulty: FaultyStore,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    to: str,
) -> None:
    """The stored object is replaced while its parts come, as by a repack."""
    monkeypatch.setattr("loraplex.adapter_store.pack_download.PART_BYTES", MIB)
    digest = store_pack(store, folder / "made", 1, mib=4)
    key = pack_key(digest)
    good = store.get(key)[0]
    store.put(key, good[:-1] + bytes([good[-1] ^ 1]))
    real, replaced, lock = store.read_into, [], threading.Lock()

    def read_into(at: str, tag: str, start: int, view: memoryview) -> None:
        with lock:
            if start > 2 * MIB and not replaced:
                replaced.append(start)
                store.delete(key)
                store.put(key if to == "the same key" else key.replace("0" * 16, "1" * 16), good)
        real(at, tag, start, view)

    monkeypatch.setattr(store, "read_into", read_into)
    path, source = DiskTier(folder, faulty, 1 << 26).ensure(TENANT, digest)
    assert (source, len(replaced)) == ("s3", 1)
    assert path.read_bytes() == good
    assert len(faulty.downloads) == 2  # the second object from its start


def test_a_full_disk_is_an_error_with_the_sizes(
    store: ObjectStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store_pack(store, folder / "made", 1, mib=1)
    tier = DiskTier(folder, store, 1 << 26)

    def full(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(LocalDiskError, match=r"disk is full: a pack of \d+ bytes.*\d+ bytes"):
            tier.ensure(TENANT, digest)
    assert hidden(folder) == []
    assert tier.ensure(TENANT, digest)[1] == "s3"


def test_on_a_disk_that_others_fill_packs_make_room_for_packs(
    store: ObjectStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = [store_pack(store, folder / "made", n, mib=1) for n in range(5)]
    tier = DiskTier(folder, store, 1 << 30)
    size, real = int(3.5 * MIB), os.posix_fallocate

    def free() -> int:
        return size - sum(path.stat().st_size for path in (folder / TENANT).iterdir())

    def allocate(fd: int, offset: int, nbytes: int) -> None:
        if nbytes > free():
            raise OSError(28, "No space left on device")
        real(fd, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free()))
    for digest in digests:
        tier.ensure(TENANT, digest)
    assert set(tier.resident()) == {f"{TENANT}/{digest}" for digest in digests[2:]}
    assert set(tier._verified) == set(tier.resident())  # nothing is kept of who has gone
    size -= 3 * MIB
    for _ in range(2):  # and when nothing helps, it is said at once
        with pytest.raises(LocalDiskError, match="the disk is full"):
            tier.ensure(TENANT, digests[0])
    assert hidden(folder) == []


def test_a_small_pack_waits_for_no_large_one(
    store: ObjectStore,
    faulty: FaultyStore,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every helper hangs in a slow part of the large pack when the small one is asked for."""
    monkeypatch.setattr("loraplex.adapter_store.pack_download.PART_BYTES", MIB)
    large = store_pack(store, folder / "made", 1, mib=14)
    small = store_pack(store, folder / "made", 2, mib=0.1)
    medium = store_pack(store, folder / "made", 3, mib=2)
    slow, hanging = threading.Event(), threading.Semaphore(0)
    real = store.read_into

    def read_into(key: str, tag: str, start: int, view: memoryview) -> None:
        if large in key and start:
            hanging.release()
            slow.wait(20)
        real(key, tag, start, view)

    monkeypatch.setattr(store, "read_into", read_into)
    tier = DiskTier(folder, faulty, 1 << 26)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(tier.ensure, TENANT, large)
        for _ in range(9):  # the helpers, and the download's own thread
            assert hanging.acquire(timeout=10)
        assert tier.ensure(TENANT, small)[1] == "s3"
        assert tier.ensure(TENANT, medium)[1] == "s3"
        assert not waiting.done()
        slow.set()
        assert waiting.result(20)[1] == "s3"


def test_two_digests_under_one_name_in_flight_come_each_as_itself(
    service: Service, faulty: FaultyStore, folder: Path
) -> None:
    old = service.publish("bot", upload(1)).digest
    faulty.download_delay_s = 0.2
    tier = DiskTier(folder, faulty, 1 << 20)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(tier.ensure, service.tenant_id, old)
        new = service.publish("bot", upload(2)).digest
        second = threads.submit(tier.ensure, service.tenant_id, new)
        paths = [first.result(10)[0], second.result(10)[0]]
    assert [Pack.open(path, verify=True).digest for path in paths] == [old, new]


def test_a_pack_of_another_version_is_made_anew(
    service: Service, faulty: FaultyStore, folder: Path
) -> None:
    version, gone = service.publish("bot", upload(1)), service.publish("gone", upload(2))
    goods = []
    for v in (version, gone):
        key = f"tenants/{service.tenant_id}/blobs/{v.digest}/{v.blob}/pack-v1.bin"
        goods.append(service.store.get(key)[0])
        service.store.put(key.replace("v1", "v0"), b"of another time")
        service.store.delete(key)
    with pytest.raises(PackVersionError, match=r"stored as pack-v0.bin.*reads pack-v1.bin"):
        DiskTier(folder, faulty, 1 << 20).ensure(service.tenant_id, version.digest)
    remake = Repacker(service.store, BASE, folder / "scratch")
    tier = DiskTier(folder, faulty, 1 << 20, remake=remake)
    path, source = tier.ensure(service.tenant_id, version.digest)
    assert source == "s3"
    assert path.read_bytes() == goods[0]
    folder_of_gone = f"tenants/{service.tenant_id}/blobs/{gone.digest}/{gone.blob}/"
    service.store.delete(folder_of_gone + "source.safetensors")
    with pytest.raises(AdapterNotFound, match="without its source: publish it again"):
        tier.ensure(service.tenant_id, gone.digest)


def test_kept_packs_outlive_others_and_other_processes_see_it(
    store: ObjectStore, folder: Path
) -> None:
    digests = [store_pack(store, folder / "made", n, mib=0.9) for n in range(6)]
    tier, other = (DiskTier(folder, store, 3 * MIB, keep_bytes=MIB) for _ in range(2))
    tier.keep(f"{TENANT}/{digests[0]}")
    for _ in range(2):
        for digest in digests:
            other.ensure(TENANT, digest)
            assert f"{TENANT}/{digests[0]}" in tier.resident()
    tier.keep(f"{TENANT}/{digests[0]}", keep=False)
    tier.keep(TENANT)  # all of its packs, but no more than fit into what may be kept
    for digest in digests[1:]:
        for _ in range(4):
            other.ensure(TENANT, digest)
    assert f"{TENANT}/{digests[0]}" not in tier.resident()


def hidden(folder: Path) -> list[Path]:
    """Files of fetches under way."""
    return [p for p in folder.rglob(".*") if p.is_file()]
