"""Where a base model comes from: a folder, S3, or the Hugging Face cache; in the end, a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import BaseModelError
from .model_download import Progress, ignore, latest_version, model_version

_REPO_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?")
_SCHEME = "s3://"


@dataclass(frozen=True)
class ModelSource:
    """What a user names a model by. Picklable: each node of a cluster brings it to its own disk.

    Args:
        name: a folder; s3://bucket/prefix; or a repository of the Hugging Face cache, "org/name" or
            "org/name@revision". A folder wins where both could be meant.
        cache: folder for models from S3.
        store: arguments of `ObjectStore` for an S3 model, but for its URL.
        version: the exact files, as `pinned` found them; None: those that are there now.
    """

    name: str
    cache: Path
    store: Mapping[str, Any] = field(default_factory=dict, repr=False)
    version: str | None = None

    @property
    def base_name(self) -> str:
        """What the model is called where nobody says otherwise."""
        if self._in_s3:
            return self.name.rstrip("/").rpartition("/")[2]
        if (match := self._repo) is not None:
            return match["repo"].rpartition("/")[2]
        return Path(self.name).resolve().name

    def folder(self, progress: Progress = ignore) -> Path:
        """The model's files on this machine; those of an S3 model are fetched if need be.

        Calls for one model at a time, in this and other processes, share one download, and one
        that was broken off is taken up again.

        Args:
            progress: told the bytes that are here and those of the whole model.

        Raises:
            BaseModelError: there is no such model, or not the version that was pinned.
            StoreError, LocalDiskError: it can't be fetched or stored.
        """
        if self._in_s3:
            cache = Path(self.cache)
            if self.version is None:
                return latest_version(self.name, cache, self.store, progress)
            return model_version(self.name, self.version, cache, self.store, progress)
        if (match := self._repo) is not None:
            return _snapshot(match["repo"], self.version or match["revision"] or "main")
        return Path(os.path.abspath(self.name))

    def pinned(self, folder: Path) -> str | None:
        """The version that `folder`, which `folder()` gave, holds; None for a folder of the user's
        own."""
        return folder.name if self._in_s3 or self._repo is not None else None

    @property
    def _in_s3(self) -> bool:
        return self.name.startswith(_SCHEME)

    @property
    def _repo(self) -> re.Match[str] | None:
        return None if Path(self.name).is_dir() else _REPO_ID.fullmatch(self.name)


def _hub() -> Path:
    """The folder of the Hugging Face cache, found as its own library does."""
    if hub := os.environ.get("HF_HUB_CACHE"):
        return Path(hub).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(home).expanduser() / "hub"


def _snapshot(repo: str, revision: str) -> Path:
    """The cached files of a repository. No network is used."""
    hub = _hub()
    home = hub / f"models--{repo.replace('/', '--')}"
    reference = home / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    folder = home / "snapshots" / commit
    if folder.is_dir():
        return folder
    snapshots = home / "snapshots"
    kept = sorted(p.name for p in snapshots.iterdir()) if snapshots.is_dir() else []
    there = f" (there are {', '.join(kept)})" if kept else ""
    of = "" if revision == "main" else f" --revision {revision}"
    raise BaseModelError(
        f"{repo!r} is no folder here, and the Hugging Face cache {hub} has no revision "
        f"{revision!r} of it{there}. Fetch it with `hf download {repo}{of}`, set HF_HOME if it is "
        "in another place, or give a folder or an s3:// URL"
    )
