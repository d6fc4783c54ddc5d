"""The disk tier: whole, verified packs or none, whoever dies and whatever rots."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from loraplex.adapter_store import (
    AdapterCorrupt,
    DiskTier,
    EmbeddedS3,
    LocalDiskError,
    NotFound,
    ObjectStore,
    Pack,
    PackPin,
    StoreUnavailable,
)

from tests.adapter_store.faults import FaultyStore
from tests.adapter_store.uploads import Service, upload


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
    import sys, time
    from pathlib import Path
    from loraplex.adapter_store import DiskTier, ObjectStore

    url, endpoint, access_key, secret_key, folder, tenant_id, digest = sys.argv[1:]
    store = ObjectStore(url, endpoint=endpoint, access_key=access_key, secret_key=secret_key)
    download = store.download

    def half(key, path):
        data = store.get(key)[0]
        path.write_bytes(data[: len(data) // 2])
        print("half", flush=True)
        time.sleep(60)

    store.download = half
    DiskTier(Path(folder), store, 1 << 20).ensure(tenant_id, digest)
"""


def test_a_process_killed_while_it_writes_leaves_no_half_file(
    service: Service, s3_server: EmbeddedS3, folder: Path
) -> None:
    [digest] = digests(service, 1)
    arguments = [
        service.store.url,
        s3_server.endpoint,
        s3_server.access_key,
        s3_server.secret_key,
        str(folder),
        service.tenant_id,
        digest,
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW_FETCH), *arguments], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"half\n"
    assert len(hidden(folder)) == 1
    # A second user of the folder leaves a living writer's file alone.
    tier = DiskTier(folder, service.store, 1 << 20)
    assert len(hidden(folder)) == 1
    assert tier.resident() == {}
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert tier.resident() == {}
    DiskTier(folder, service.store, 1 << 20)
    assert hidden(folder) == []
    path, source = tier.ensure(service.tenant_id, digest)
    assert source == "s3"
    assert Pack.open(path).digest == digest


def hidden(folder: Path) -> list[Path]:
    """Files of fetches under way."""
    return [p for p in folder.rglob(".*") if p.is_file()]
