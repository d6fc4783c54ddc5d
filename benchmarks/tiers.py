"""How fast packs reach a node's memory, against raw transfers of the same bytes in the same run.

    python benchmarks/tiers.py

One synthetic pack of Qwen3-30B-A3B's layer shape (rank 16, bfloat16, all experts). From the store:
the embedded SeaweedFS on this machine, against parallel ranged GETs over bare HTTP connections into
memory, with the best of several numbers of connections. From the disk: against parallel reads of
the same file into memory, after the page cache was told to drop it, and again out of the page
cache. The tiers check every byte on the way, and write what comes from the store to the disk; raw
transfers do neither. The two take turns; each figure is the median over the rounds.

Timings of a machine that does other work meanwhile are good for the ratios alone.
"""

from __future__ import annotations

import argparse
import http.client
import json
import mmap
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from loraplex.adapter_store import (
    BaseModel,
    DiskTier,
    EmbeddedS3,
    ExpertFactors,
    HostTier,
    LoraFactors,
    ObjectStore,
    canonical_adapter,
    canonical_layer,
    write_pack,
)

TENANT = "t-benchmark"
PART_BYTES = 8 << 20
CONNECTIONS = (2, 4, 8, 16)
READERS = (1, 2, 4, 8)
HIDDEN, INTERMEDIATE, EXPERTS, RANK = 2048, 768, 128, 16


def make_pack(path: Path, layers: int) -> str:
    """Writes the pack; its digest."""
    rng = np.random.default_rng()
    base = BaseModel(
        name="benchmark",
        fingerprint="0" * 64,
        model_type="qwen3_moe",
        num_layers=layers,
        hidden=HIDDEN,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        num_experts=EXPERTS,
        moe_intermediate=INTERMEDIATE,
        dense_targets={},
        moe_layers=tuple(range(layers)),
        accepted_names=(),
    )

    def factors(out: int, in_: int) -> LoraFactors:
        a, b = (
            np.frombuffer(rng.bytes(2 * n * RANK), np.uint16).reshape(shape)
            for n, shape in ((in_, (RANK, in_)), (out, (out, RANK)))
        )
        return LoraFactors(1.0, a, b)

    def expert() -> ExpertFactors:
        return ExpertFactors(
            gate=factors(INTERMEDIATE, HIDDEN),
            up=factors(INTERMEDIATE, HIDDEN),
            down=factors(HIDDEN, INTERMEDIATE),
        )

    made = [canonical_layer(n, {}, {e: expert() for e in range(EXPERTS)}) for n in range(layers)]
    digest = os.urandom(32).hex()
    write_pack(path, canonical_adapter(base, made), digest)
    return digest


def buffer(nbytes: int) -> memoryview:
    """Memory that is there already, as an arena's is once it was used."""
    data = mmap.mmap(-1, nbytes)
    for at in range(0, nbytes, mmap.PAGESIZE):
        data[at] = 1
    return memoryview(data)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def presign(store: ObjectStore, key: str) -> str:
    """A URL that bare HTTP connections can GET. The store's own surface presigns uploads only."""
    parameters = {"Bucket": store.bucket, "Key": key}
    return store._client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=3600)


def raw_gets(url: str, view: memoryview, connections: int) -> None:
    """Reads an object by ranged GETs, each thread over one connection."""
    parts = urlsplit(url)
    target = f"{parts.path}?{parts.query}"
    mine = threading.local()

    def get(start: int) -> None:
        if not hasattr(mine, "connection"):
            mine.connection = http.client.HTTPConnection(parts.netloc)
        stop = min(start + PART_BYTES, len(view))
        mine.connection.request("GET", target, headers={"Range": f"bytes={start}-{stop - 1}"})
        answer = mine.connection.getresponse()
        at = start
        while n := answer.readinto(view[at:stop]):
            at += n
        answer.read()
        if at != stop:
            raise RuntimeError(f"a GET of bytes {start} to {stop} ended at {at}: {answer.status}")

    with ThreadPoolExecutor(connections) as threads:
        list(threads.map(get, range(0, len(view), PART_BYTES)))


def raw_reads(path: Path, view: memoryview, readers: int) -> None:
    """Reads a file, each thread a part at a time."""
    fd = os.open(path, os.O_RDONLY)

    def read(start: int) -> None:
        at, stop = start, min(start + PART_BYTES, len(view))
        while at < stop:
            at += os.preadv(fd, [view[at:stop]], at)

    with ThreadPoolExecutor(readers) as threads:
        list(threads.map(read, range(0, len(view), PART_BYTES)))
    os.close(fd)


def drop_cache(path: Path) -> None:
    """Asks the kernel to drop a file's pages."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def await_disk(disk: DiskTier, key: str) -> None:
    while not disk.has(key):
        time.sleep(0.005)


def from_store(
    tier: HostTier, disk: DiskTier, url: str, digest: str, nbytes: int, n: int
) -> dict[str, list[float]]:
    """Seconds by way, over `n` rounds."""
    key = f"{TENANT}/{digest}"
    view = buffer(nbytes)
    seconds: dict[str, list[float]] = {"tier": [], "durable": []}
    for _ in range(n):
        for connections in CONNECTIONS:
            taken = timed(lambda c=connections: raw_gets(url, view, c))
            seconds.setdefault(f"raw {connections}", []).append(taken)
        tier.remove(key)
        started = time.perf_counter()
        _, source = tier.ensure(TENANT, digest)
        seconds["tier"].append(time.perf_counter() - started)
        assert source == "s3", source
        await_disk(disk, key)
        seconds["durable"].append(time.perf_counter() - started)
    return seconds


def from_disk(
    tier: HostTier, disk: DiskTier, digest: str, nbytes: int, n: int, cached: bool
) -> dict[str, list[float]]:
    """Seconds by way, over `n` rounds. Memory alone is emptied."""
    key = f"{TENANT}/{digest}"
    path, _ = disk.ensure(TENANT, digest)
    view = buffer(nbytes)
    seconds: dict[str, list[float]] = {"tier": []}
    for _ in range(n):
        for readers in READERS:
            if not cached:
                drop_cache(path)
            taken = timed(lambda r=readers: raw_reads(path, view, r))
            seconds.setdefault(f"raw {readers}", []).append(taken)
        tier._arena.remove(key)
        if not cached:
            drop_cache(path)
        started = time.perf_counter()
        _, source = tier.ensure(TENANT, digest)
        seconds["tier"].append(time.perf_counter() - started)
        assert source == "disk", source
    return seconds


def summary(seconds: dict[str, list[float]], nbytes: int) -> dict[str, float]:
    """MB/s of each way, and how the tier compares with the best raw one."""
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    best = min(taken for way, taken in medians.items() if way.startswith("raw"))
    speeds = {f"{way} MB/s": round(nbytes / taken / 1e6, 1) for way, taken in medians.items()}
    return {**speeds, "to_best_raw": round(best / medians["tier"], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--machine", default="cpu-2core", help="name of the results folder")
    parser.add_argument("--layers", type=int, default=12, help="of the pack: 35 MB each")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as name,
        tempfile.TemporaryDirectory(dir="/dev/shm") as shm,
        EmbeddedS3(Path(name) / "store") as server,
    ):
        folder = Path(name)
        store = ObjectStore(
            server.url,
            endpoint=server.endpoint,
            access_key=server.access_key,
            secret_key=server.secret_key,
        )
        digest = make_pack(folder / "pack", args.layers)
        nbytes = (folder / "pack").stat().st_size
        key = f"tenants/{TENANT}/blobs/{digest}/0/pack-v1.bin"
        store.upload(folder / "pack", key)
        (folder / "pack").unlink()
        url = presign(store, key)
        disk = DiskTier(folder / "disk", store, 4 * nbytes)
        tier = HostTier(disk, nbytes + (1 << 20), Path(shm) / "arena")
        tier.ensure(TENANT, digest)  # the arena's memory is there from now on
        await_disk(disk, f"{TENANT}/{digest}")
        rows = {
            "store to memory": summary(
                from_store(tier, disk, url, digest, nbytes, args.rounds), nbytes
            ),
            "disk to memory": summary(
                from_disk(tier, disk, digest, nbytes, args.rounds, cached=False), nbytes
            ),
            "page cache to memory": summary(
                from_disk(tier, disk, digest, nbytes, args.rounds, cached=True), nbytes
            ),
        }
        tier.close()
    for title, row in rows.items():
        print(title)
        for way, value in row.items():
            print(f"  {way:<16}{value:10.3f}")
    result = {
        "machine": args.machine,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "loraplex": version("loraplex")},
        "load_average": os.getloadavg()[0],  # beside 2 or so that this run makes itself
        "cores": os.cpu_count(),
        "pack_bytes": nbytes,
        "part_bytes": PART_BYTES,
        "rounds": args.rounds,
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / args.machine / "tiers.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
