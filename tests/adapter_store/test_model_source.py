"""Models from S3 and from the Hugging Face cache: whole, once, and as they were named."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from loraplex.adapter_store import (
    BaseModelError,
    LocalDiskError,
    ModelSource,
    ObjectStore,
    StoreUnavailable,
    model_download,
)

RANGE = 1000  # bytes, in these tests


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch):
    monkeypatch.setattr(model_download, "RANGE_BYTES", RANGE)
    monkeypatch.setattr(model_download, "_SPARE_BYTES", 0)


@pytest.fixture
def remote(store: ObjectStore):
    """A model in S3, beside what isn't served from; its files, and the source that names it."""
    rng = random.Random()
    files = {
        "config.json": b"{}",
        "tokenizer.json": rng.randbytes(RANGE),
        "model-1.safetensors": rng.randbytes(7 * RANGE + rng.randrange(RANGE)),
        "model-2.safetensors": rng.randbytes(3 * RANGE + 1),
        "merges.txt": b"",
    }
    for name, data in files.items():
        store.put(f"models/tiny/{name}", data)
    for name in ("pytorch_model.bin", "original/model.safetensors", "README.md"):
        store.put(f"models/tiny/{name}", b"not wanted")
    return store, files


@pytest.fixture
def source(remote, s3_server, tmp_path):
    options = {
        "endpoint": s3_server.endpoint,
        "access_key": s3_server.access_key,
        "secret_key": s3_server.secret_key,
    }
    return ModelSource(f"{remote[0].url}/models/tiny", tmp_path / "cache", options)


@pytest.fixture
def asked(monkeypatch):
    """The ranges that were asked for, as (file, start). `asked.limit`: then the store is gone."""

    class Asked(list):
        limit: int | None = None

    asked, real = Asked(), ObjectStore.read_range

    def read_range(self, key, etag, start, length, fd):
        if asked.limit is not None and len(asked) >= asked.limit:
            raise StoreUnavailable("the store is gone")
        asked.append((key, start))
        real(self, key, etag, start, length, fd)

    monkeypatch.setattr(ObjectStore, "read_range", read_range)
    return asked


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_models_files_come_whole_and_are_kept(remote, source, asked):
    _, files = remote
    seen = []
    folder = source.folder(lambda done, total: seen.append((done, total)))
    assert contents(folder) == files
    total = sum(map(len, files.values()))
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert len(asked) == sum(-(-len(data) // RANGE) for data in files.values())
    assert source.folder() == folder
    assert len(asked) == len(set(asked))  # nothing twice
    assert source.base_name == "tiny"


def test_a_broken_download_goes_on_where_it_was(remote, source, asked):
    _, files = remote
    asked.limit = 6
    with pytest.raises(StoreUnavailable):
        source.folder()
    first = set(asked)
    assert len(first) == 6
    asked.limit = None
    assert contents(source.folder()) == files
    assert len(asked) == len(set(asked))


def test_ranges_of_before_a_restart_of_the_machine_are_fetched_again(
    remote, source, asked, tmp_path
):
    asked.limit = 6
    with pytest.raises(StoreUnavailable):
        source.folder()
    for journal in (tmp_path / "cache").glob("*/*.partial/.ranges/*"):
        _, *ranges = journal.read_text().splitlines()
        journal.write_text("\n".join(["another boot", *ranges, ""]))
    first = set(asked)
    asked.limit = None
    assert contents(source.folder()) == remote[1]
    assert all(asked.count(job) == 2 for job in first)


def test_threads_and_processes_share_one_download(remote, source, asked, tmp_path):
    with ThreadPoolExecutor(4) as threads:
        folders = set(threads.map(lambda _: source.folder(), range(4)))
    assert len(folders) == 1
    assert len(asked) == len(set(asked))
    code = (
        "import pickle, sys; from loraplex.adapter_store import ModelSource\n"
        "print(ModelSource(**pickle.load(sys.stdin.buffer)).folder())"
    )
    given = {"name": source.name, "cache": tmp_path / "other", "store": dict(source.store)}
    others = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    with ThreadPoolExecutor(2) as threads:
        answers = threads.map(lambda process: process.communicate(pickle.dumps(given))[0], others)
        found = {Path(answer.decode().strip()) for answer in answers}
    assert [process.wait(30) for process in others] == [0, 0]
    assert len(found) == 1
    assert contents(found.pop()) == remote[1]


def test_a_changed_model_is_another_folder_and_a_pinned_one_stays(remote, source, asked):
    store, files = remote
    old = source.folder()
    pinned = ModelSource(source.name, source.cache, source.store, source.pinned(old))
    changed = os.urandom(len(files["model-2.safetensors"]))
    store.put("models/tiny/model-2.safetensors", changed)
    new = source.folder()
    assert contents(new) == {**files, "model-2.safetensors": changed}
    assert contents(old) == files
    assert pinned.folder() == old
    elsewhere = ModelSource(source.name, source.cache / "x", source.store, pinned.version)
    with pytest.raises(BaseModelError, match="has changed since the service was started"):
        elsewhere.folder()


def test_a_model_that_changes_while_it_is_fetched_is_refused(remote, source, monkeypatch):
    store, _ = remote
    real = ObjectStore.read_range

    def read_range(self, key, *rest):
        if key == "model-2.safetensors":
            store.put(f"models/tiny/{key}", b"new")
        real(self, key, *rest)

    monkeypatch.setattr(ObjectStore, "read_range", read_range)
    with pytest.raises(BaseModelError, match="was changed while it was fetched"):
        source.folder()


def test_without_the_store_the_last_one_is_served(source, caplog, monkeypatch):
    folder = source.folder()

    def unreachable(self, prefix):
        raise StoreUnavailable("nobody answers")

    monkeypatch.setattr(ObjectStore, "list", unreachable)
    assert source.folder() == folder
    assert "as it was fetched last: nobody answers" in caplog.text
    with pytest.raises(StoreUnavailable):
        ModelSource(source.name, source.cache / "empty", source.store).folder()


def test_what_isnt_a_model_and_what_doesnt_fit_is_said(remote, source, monkeypatch):
    store, _ = remote
    nothing = ModelSource(f"{store.url}/models/none", source.cache, source.store)
    with pytest.raises(BaseModelError, match=r"no config\.json at s3://.*/models/none: give"):
        nothing.folder()
    monkeypatch.setattr(model_download, "_SPARE_BYTES", 1 << 60)
    with pytest.raises(LocalDiskError, match=r"GB more in .* are free"):
        source.folder()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face cache with two snapshots of org/tiny."""
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    home = tmp_path / "hub" / "models--org--tiny"
    for commit in ("aa11", "bb22"):
        (home / "snapshots" / commit).mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("bb22")
    return home


def test_a_cached_repository_is_found_at_its_revision(hub, tmp_path):
    source = ModelSource("org/tiny", tmp_path)
    assert source.folder() == hub / "snapshots" / "bb22"
    assert source.base_name == "tiny"
    assert ModelSource("org/tiny@aa11", tmp_path).folder() == hub / "snapshots" / "aa11"
    pin = source.pinned(source.folder())
    (hub / "refs" / "main").write_text("aa11")
    assert ModelSource("org/tiny", tmp_path, {}, pin).folder() == hub / "snapshots" / "bb22"


def test_a_repository_that_isnt_cached_says_how_to_fetch_it(hub, tmp_path):
    with pytest.raises(BaseModelError, match=r"no folder here.*hf download org/other`"):
        ModelSource("org/other", tmp_path).folder()
    with pytest.raises(
        BaseModelError,
        match=r"'v2' of it \(there are aa11, bb22\).*hf download org/tiny --revision v2`",
    ):
        ModelSource("org/tiny@v2", tmp_path).folder()


def test_a_folder_wins_over_a_repository(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    source = ModelSource("org/tiny", tmp_path)
    assert source.folder() == tmp_path / "org" / "tiny"
    assert source.pinned(source.folder()) is None
