"""The host tier: whole, verified packs in shared memory, for as long as anybody uses them."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from loraplex.adapter_store import (
    AdapterCorrupt,
    DiskTier,
    EmbeddedS3,
    FetchCancelled,
    HostTier,
    ObjectStore,
    Pack,
    PackPin,
    StoreUnavailable,
    host_arena,
    host_folder,
)

from tests.adapter_store.faults import FaultyStore
from tests.adapter_store.stored_packs import MIB, TENANT, pack_key, store_pack

Make = Callable[..., HostTier]


@pytest.fixture
def faulty(store: ObjectStore) -> FaultyStore:
    return FaultyStore(store)


@pytest.fixture
def shm() -> Iterator[Path]:
    """A folder in memory of this test's own."""
    folder = Path("/dev/shm") / f"loraplex-test-{os.getpid()}-{time.time_ns()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def make(faulty: FaultyStore, tmp_path: Path, shm: Path) -> Make:
    """Tiers on one disk folder and one arena, as the groups of a node have them."""

    def new(max_bytes: int = 4 * MIB, disk_bytes: int = 64 * MIB) -> HostTier:
        disk = DiskTier(tmp_path / "disk", faulty, disk_bytes)  # type: ignore[arg-type]
        return HostTier(disk, max_bytes, host_folder(tmp_path / "disk", shm))

    return new


def stored(store: ObjectStore, folder: Path, count: int, mib: float = 0.1) -> list[str]:
    return [store_pack(store, folder / "made", seed, mib) for seed in range(count)]


def key(digest: str) -> str:
    return f"{TENANT}/{digest}"


def good_bytes(store: ObjectStore, digest: str) -> bytes:
    return store.get(pack_key(digest))[0]


def test_a_pack_comes_from_the_store_then_from_the_disk_then_from_memory(
    store: ObjectStore, faulty: FaultyStore, make: Make, tmp_path: Path
) -> None:
    [digest] = stored(store, tmp_path, 1, mib=3)
    tier = make()
    path, source = tier.ensure(TENANT, digest)
    assert source == "s3"
    pack = Pack.open(path)
    assert pack.memory.tobytes() == good_bytes(store, digest)
    assert pack.digest == digest
    assert pack.arena is not None
    assert not pack.memory.flags.writeable
    offset = pack.memory.ctypes.data - pack.arena.ctypes.data
    assert offset % 4096 == 0
    assert 0 <= offset <= len(pack.arena) - pack.nbytes
    assert tier.ensure(TENANT, digest) == (path, "host")
    assert tier.host_resident() == {key(digest): pack.nbytes}
    del pack
    wait_until(lambda: (tmp_path / "disk" / TENANT / f"{digest}.pack").exists())
    tier._arena.remove(key(digest))
    assert tier.host_resident() == {}
    faulty.fail = lambda action, key: True
    path, source = tier.ensure(TENANT, digest)
    assert source == "disk"
    assert Pack.open(path).memory.tobytes() == good_bytes(store, digest)


def test_another_process_opens_what_it_is_told(
    store: ObjectStore, make: Make, tmp_path: Path
) -> None:
    [digest] = stored(store, tmp_path, 1)
    tier = make()
    path, _ = tier.ensure(TENANT, digest)
    code = """
        import pickle, sys
        from loraplex.adapter_store import Pack
        pack = Pack.open(pickle.loads(bytes.fromhex(sys.argv[1])), verify=True)
        print(pack.digest, pack.a13(0, 0).sum())
    """
    told = pickle.dumps(path).hex()
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), told], capture_output=True, text=True
    )
    assert out.stdout.split() == [digest, str(Pack.open(path).a13(0, 0).sum())], out.stderr


def test_packs_share_the_processs_one_mapping(
    store: ObjectStore, make: Make, tmp_path: Path
) -> None:
    a, b = stored(store, tmp_path, 2)
    tier = make()
    packs = [Pack.open(tier.ensure(TENANT, digest)[0]) for digest in (a, b)]
    assert packs[0].arena is packs[1].arena
    again = make()
    assert Pack.open(again.ensure(TENANT, a)[0]).arena is packs[0].arena


def test_what_is_open_stays_and_a_view_is_enough(
    store: ObjectStore, make: Make, tmp_path: Path
) -> None:
    digests = stored(store, tmp_path, 6, mib=1)
    tier = make(max_bytes=int(2.5 * MIB))
    pack = Pack.open(tier.ensure(TENANT, digests[0])[0])
    view = pack.a13(0, 0)[3:]
    before = view.copy()
    del pack
    gc.collect()
    for digest in digests[1:]:
        tier.ensure(TENANT, digest)
        assert key(digests[0]) in tier.host_resident()
    tier.remove(key(digests[0]))  # deleted while in use
    assert key(digests[0]) in tier.host_resident()
    assert np.array_equal(view, before)
    del view
    gc.collect()
    tier.remove(key(digests[0]))
    assert key(digests[0]) not in tier.resident()


def test_pins_hold_against_other_processes_and_end_with_their_holder(
    store: ObjectStore, make: Make, tmp_path: Path
) -> None:
    a, b = stored(store, tmp_path, 2, mib=1)
    tier = make(max_bytes=int(1.5 * MIB))
    path, _ = tier.ensure(TENANT, a)
    code = """
        import sys, time
        from pathlib import Path
        from loraplex.adapter_store import Pack
        pack = Pack.open(Path(sys.argv[1]))
        print("open", flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(path)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"open\n"
    disk_path, source = tier.ensure(TENANT, b)  # no room beside the one in use
    assert (disk_path.parent.parent.name, source) == ("disk", "s3")
    assert set(tier.host_resident()) == {key(a)}
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert tier.ensure(TENANT, b)[1] == "disk"
    assert set(tier.host_resident()) == {key(b)}
    with pytest.raises(FileNotFoundError):
        PackPin(path)


def test_threads_and_tiers_that_ask_for_one_pack_share_one_download(
    store: ObjectStore, faulty: FaultyStore, make: Make, tmp_path: Path
) -> None:
    [digest] = stored(store, tmp_path, 1)
    faulty.download_delay_s = 0.2
    tiers = [make(), make(), make()]
    with ThreadPoolExecutor(9) as threads:
        got = list(threads.map(lambda n: tiers[n % 3].ensure(TENANT, digest), range(9)))
    assert len(faulty.downloads) == 1
    assert len({path for path, _ in got}) == 1
    assert {source for _, source in got} == {"s3", "host"}


def test_what_does_not_fit_in_memory_is_used_from_the_disk(
    store: ObjectStore, make: Make, tmp_path: Path
) -> None:
    [digest] = stored(store, tmp_path, 1, mib=2)
    tier = make(max_bytes=MIB)
    path, source = tier.ensure(TENANT, digest)
    assert source == "s3"
    assert Pack.open(path).arena is None
    assert tier.ensure(TENANT, digest) == (path, "disk")


def test_without_memory_for_it_a_pack_is_used_from_the_disk(
    store: ObjectStore, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose /dev/shm is smaller than the setting."""
    [digest] = stored(store, tmp_path, 1)
    tier = make()

    def full(fd: int, offset: int, nbytes: int) -> None:
        if "arena" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(28, "No space left on device")
        os.ftruncate(fd, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", full)
    path, source = tier.ensure(TENANT, digest)
    assert source == "s3"
    assert Pack.open(path).arena is None
    assert tier.host_resident() == {}


def test_a_memory_that_takes_not_even_an_entry_harms_nobody_later(
    store: ObjectStore, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others have filled the file system; then there is room again."""
    a, b = stored(store, tmp_path, 2)
    tier = make()
    real = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".fill"):
            raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert Pack.open(tier.ensure(TENANT, a)[0]).arena is None
    for each in (tier, make()):
        assert each._arena._filling() == []
        assert Pack.open(each.ensure(TENANT, b)[0]).arena is not None


def test_an_arena_that_another_process_makes_meanwhile_is_taken_as_it_is(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = host_arena._make

    def and_then_another(folder: Path, size: int) -> None:
        real(folder, size)
        real(folder, MIB)  # by who came between this one's two locks

    monkeypatch.setattr(host_arena, "_make", and_then_another)
    arena = make()._arena
    assert arena.nbytes == len(arena._map) == MIB


@pytest.mark.parametrize("offset", [3, 40, 4500, -20])
def test_a_bit_that_flipped_on_the_disk_is_found_on_the_way_to_memory(
    store: ObjectStore, faulty: FaultyStore, make: Make, tmp_path: Path, offset: int
) -> None:
    [digest] = stored(store, tmp_path, 1)
    disk = DiskTier(tmp_path / "disk", store, 64 * MIB)
    path, _ = disk.ensure(TENANT, digest)
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)
    found, source = make().ensure(TENANT, digest)
    assert (source, len(faulty.downloads)) == ("s3", 1)
    assert Pack.open(found).memory.tobytes() == good_bytes(store, digest)


def test_a_damaged_blob_is_an_error_and_takes_no_memory(
    store: ObjectStore, make: Make, tmp_path: Path
) -> None:
    a, b = stored(store, tmp_path, 2)
    store.put(pack_key(a), good_bytes(store, a)[:-100])
    tier = make()
    with pytest.raises(AdapterCorrupt, match=a):
        tier.ensure(TENANT, a)
    assert tier.ensure(TENANT, b)[1] == "s3"
    assert set(tier.host_resident()) == {key(b)}
    assert list(tier._arena._filling()) == []


def test_with_the_store_down_what_is_here_goes_on(
    store: ObjectStore, faulty: FaultyStore, make: Make, tmp_path: Path
) -> None:
    a, b = stored(store, tmp_path, 2)
    tier = make()
    tier.ensure(TENANT, a)
    faulty.fail = lambda action, key: True
    assert tier.ensure(TENANT, a)[1] == "host"
    with pytest.raises(StoreUnavailable):
        tier.ensure(TENANT, b)
    faulty.fail = lambda action, key: False
    assert tier.ensure(TENANT, b)[1] == "s3"


def test_when_nobody_waits_any_more_the_fetch_ends_and_its_memory_is_free(
    store: ObjectStore,
    faulty: FaultyStore,
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loraplex.adapter_store.pack_download.PART_BYTES", MIB)
    [digest] = stored(store, tmp_path, 1, mib=12)
    tier = make(max_bytes=16 * MIB)
    faulty.download_delay_s = 0.2
    gone = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(tier.ensure, TENANT, digest, lambda: not gone.is_set())
        wait_until(lambda: len(faulty.parts) > 1)
        gone.set()
        with pytest.raises(FetchCancelled):
            first.result(5)
        wait_until(lambda: not tier._disk._flights.running())
    asked = len(faulty.parts)
    assert asked < 13
    assert tier._arena._filling() == []
    assert tier.resident() == {}
    faulty.download_delay_s = 0
    path, source = tier.ensure(TENANT, digest)  # goes on where that one stopped
    assert source == "s3"
    assert Pack.open(path).memory.tobytes() == good_bytes(store, digest)
    starts = [start for _, start, _ in faulty.parts]
    assert len(set(starts)) == len(starts)


FILL = """
    import sys, time
    from pathlib import Path
    from loraplex.adapter_store import DiskTier, HostTier, ObjectStore

    url, endpoint, access_key, secret_key, disk, folder, tenant_id, digest = sys.argv[1:]
    store = ObjectStore(url, endpoint=endpoint, access_key=access_key, secret_key=secret_key)
    read_into = store.read_into

    def half(key, etag, start, view):
        read_into(key, etag, start, view)
        print("part", flush=True)
        time.sleep(60)

    store.read_into = half
    tier = HostTier(DiskTier(Path(disk), store, 1 << 26), 4 << 20, Path(folder))
    tier.ensure(tenant_id, digest)
"""


def process_of(
    script: str, store: ObjectStore, server: EmbeddedS3, tmp_path: Path, shm: Path, *digests: str
) -> list[str]:
    """A command that runs a script over the same tiers."""
    arguments = [
        store.url,
        server.endpoint,
        server.access_key,
        server.secret_key,
        str(tmp_path / "disk"),
        str(host_folder(tmp_path / "disk", shm)),
        TENANT,
        *digests,
    ]
    return [sys.executable, "-c", textwrap.dedent(script), *arguments]


def test_a_process_killed_while_it_fills_memory_leaves_nothing_there(
    store: ObjectStore, s3_server: EmbeddedS3, make: Make, tmp_path: Path, shm: Path
) -> None:
    a, b = stored(store, tmp_path, 2, mib=2.5)  # no room for both
    command = process_of(FILL, store, s3_server, tmp_path, shm, a)
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"part\n"
    tier = make()
    assert len(tier._arena._filling()) == 1
    assert tier.resident() == {}
    assert Pack.open(tier.ensure(TENANT, b)[0]).arena is None  # the living one has the room
    process.send_signal(signal.SIGKILL)
    process.wait()
    path, _ = tier.ensure(TENANT, a)
    assert Pack.open(path).arena is not None
    assert Pack.open(path).memory.tobytes() == good_bytes(store, a)
    assert tier._arena._filling() == []


def test_arenas_of_ended_runs_are_removed_and_living_ones_stay(
    store: ObjectStore, make: Make, shm: Path, tmp_path: Path
) -> None:
    [digest] = stored(store, tmp_path, 1)
    living = HostTier(DiskTier(tmp_path / "other", store, MIB), MIB, host_folder(Path("/o"), shm))
    path, _ = living.ensure(TENANT, digest)
    dead = shm / "loraplex-host-0-dead"
    dead.mkdir()
    (dead / "users").touch()
    (dead / "arena").write_bytes(b"x" * 100)
    (shm / "loraplex-other").mkdir()
    tier = make()
    assert not dead.exists()
    assert Pack.open(path).digest == digest
    assert (shm / "loraplex-other").exists()
    second = make()
    tier.ensure(TENANT, digest)
    tier.close()
    assert second.host_resident()
    second.close()
    assert sorted(p.name for p in shm.iterdir()) == sorted(
        ["loraplex-other", host_folder(Path("/o"), shm).name]
    )


def test_packs_outlive_a_restart_of_a_group_that_was_killed(
    store: ObjectStore, make: Make, tmp_path: Path
) -> None:
    [digest] = stored(store, tmp_path, 1)
    tier = make()
    tier.ensure(TENANT, digest)
    os.close(tier._arena._users)  # what a kill does
    tier._arena._users = -1
    assert make().ensure(TENANT, digest)[1] == "host"
    assert make(max_bytes=2 * MIB)._arena.nbytes == 4 * MIB  # of those who use it


def test_what_cant_be_removed_now_is_no_error_and_goes_later(
    store: ObjectStore, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks is an engine between two steps: an error would end it."""
    [digest] = stored(store, tmp_path, 1)
    tier = make()
    tier.ensure(TENANT, digest)
    wait_until(lambda: tier.resident() and not any((tmp_path / "disk" / ".locks").iterdir()))
    real = os.open

    def no_files(path: Path, *arguments: int, **more: int) -> int:
        if str(path).startswith((str(tmp_path), "/dev/shm")):
            raise OSError(24, "Too many open files")
        return real(path, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", no_files)
        tier.remove(key(digest))
    assert list(tier.resident()) == list(tier.host_resident()) == [key(digest)]
    tier.remove(key(digest))
    assert (tier.resident(), tier.host_resident()) == ({}, {})


def test_single_packs_are_kept_as_they_were_last_told_and_tenants_beside_them(
    store: ObjectStore, make: Make, tmp_path: Path
) -> None:
    digests = stored(store, tmp_path, 5, mib=0.9)
    tier, other = make(max_bytes=3 * MIB), make(max_bytes=3 * MIB)
    tier.keep("t-other")
    for kept in (key(digests[0]), key(digests[1])):
        tier.ensure(TENANT, kept.partition("/")[2])
        tier.keep_packs([kept])
        for digest in digests[2:]:
            for _ in range(3):
                other.ensure(TENANT, digest)
        assert kept in tier.host_resident()
    assert key(digests[0]) not in tier.host_resident()
    assert other._arena.kept.names() == {"t-other", key(digests[1])}


def test_kept_tenants_stay_within_their_bound(
    store: ObjectStore, make: Make, tmp_path: Path
) -> None:
    digests = stored(store, tmp_path, 6, mib=0.9)
    tier = make(max_bytes=3 * MIB)  # 1.5 of it may be kept: one pack
    other = make(max_bytes=3 * MIB)
    tier.keep(key(digests[0]))
    tier.keep(key(digests[1]))
    for digest in digests:
        other.ensure(TENANT, digest)
    kept = set(tier.host_resident()) & {key(d) for d in digests[:2]}
    assert len(kept) == 1
    tier.keep(key(digests[0]), False)
    tier.keep(key(digests[1]), False)
    for digest in digests[2:]:
        for _ in range(3):
            other.ensure(TENANT, digest)
    assert not set(tier.host_resident()) & {key(d) for d in digests[:2]}


CHURN = """
    import os, random, sys, time, zlib
    from pathlib import Path
    from loraplex.adapter_store import DiskTier, HostTier, ObjectStore, Pack

    url, endpoint, access_key, secret_key, disk, folder, tenant_id, *digests = sys.argv[1:]
    store = ObjectStore(url, endpoint=endpoint, access_key=access_key, secret_key=secret_key)
    tier = HostTier(DiskTier(Path(disk), store, 3 << 20), 2 << 20, Path(folder))
    rng = random.Random(os.getpid())
    sums, kept = {}, []
    until = time.monotonic() + 3
    n = 0
    while n < 50 or time.monotonic() < until:
        digest = rng.choice(digests)
        path, _ = tier.ensure(tenant_id, digest)
        try:
            pack = Pack.open(path, verify=True)
        except FileNotFoundError:
            continue
        assert pack.digest == digest
        kept.append((pack.memory, zlib.crc32(pack.memory)))
        if len(kept) > 3:
            memory, crc = kept.pop(rng.randrange(4))
            assert zlib.crc32(memory) == crc, "the bytes of a pack in use have changed"
        if rng.random() < 0.1:
            tier.remove(f"{tenant_id}/{rng.choice(digests)}")
        n += 1
"""


def test_eviction_under_load_never_touches_what_is_in_use(
    store: ObjectStore, s3_server: EmbeddedS3, tmp_path: Path, shm: Path
) -> None:
    digests = [store_pack(store, tmp_path / "made", n, 0.1 + 0.1 * (n % 5)) for n in range(20)]
    command = process_of(CHURN, store, s3_server, tmp_path, shm, *digests)
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], outs[0][1] + outs[1][1] + outs[2][1]


def wait_until(holds: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
