"""What all tests share: they see the installed package only, never the folders' bare names."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from loraplex.adapter_store import EmbeddedS3, ObjectStore

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` puts the working directory on the path, where transformers would find our
# `kernels` and take it for the package of that name. Child processes and Ray workers inherit
# the variable.
os.environ["PYTHONSAFEPATH"] = "1"
# Ray clusters of tests stay on loopback (cluster/local_ray.py says how) and tell nobody.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Without a GPU, Triton's kernels run in its interpreter: asked for before they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# No test depends on how fast the machine is.
settings.register_profile("loraplex", deadline=None)
settings.load_profile("loraplex")
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    """A real object store, shared by all tests: work below a prefix of your own."""
    with EmbeddedS3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def store(s3_server: EmbeddedS3) -> ObjectStore:
    """An empty part of the shared object store."""
    return ObjectStore(
        f"{s3_server.url}/{uuid.uuid4().hex}",
        endpoint=s3_server.endpoint,
        access_key=s3_server.access_key,
        secret_key=s3_server.secret_key,
    )
