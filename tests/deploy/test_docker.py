"""The Dockerfiles and compose files: what they copy is there, and nobody is let in but by loopback.

The images are built by an engine, or by deploy/docker/build_in_chroot.py where there is none.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from loraplex.cluster.settings import Settings
from loraplex.cluster.settings_sources import ENV_PREFIX

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "deploy/docker"
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")


@pytest.fixture(scope="module")
def chroot() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chroot", DOCKER / "build_in_chroot.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chroot"] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


def test_a_dockerfile_is_read_as_docker_reads_it(chroot: ModuleType) -> None:
    text = '# a comment\nFROM x AS y\nRUN a \\\n  && b \\\n# between\n  && c\n\nCMD ["d"]\n'
    assert chroot.instructions(text) == [
        ("FROM", "x AS y"),
        ("RUN", "a && b && c"),
        ("CMD", '["d"]'),
    ]
    assert chroot.expand("$A/${B}/$C", {"A": "1", "B": "2"}) == "1/2/$C"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_copy_what_there_is_run_unprivileged_and_say_whether_they_serve(
    chroot: ModuleType, name: str
) -> None:
    lines = chroot.instructions((DOCKER / name).read_text())
    ignored = (DOCKER / f"{name}.dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    for instruction, arguments in lines:
        if instruction == "COPY" and not arguments.startswith("--from="):
            for source in arguments.split()[:-1]:
                assert (ROOT / source.removeprefix("./")).exists()
                assert source in allowed
    packages = {p.name for p in ROOT.iterdir() if (p / "__init__.py").is_file()}
    assert packages <= set(allowed) | {"tests"}
    by_name = dict(lines)  # the last of each
    assert by_name["USER"] == "loraplex"
    assert "/ready" in by_name["HEALTHCHECK"]
    for instruction, arguments in lines:
        variable = arguments.partition("=")[0]
        if instruction == "ENV" and variable.startswith(ENV_PREFIX):
            assert variable.removeprefix(ENV_PREFIX).lower() in Settings.model_fields


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yml").read_text())


def test_compose_opens_loopback_only_and_keeps_the_store_to_itself(compose: dict) -> None:
    services = compose["services"]
    assert "ports" not in services["objectstore"]
    assert services["objectstore"]["networks"] == ["store"]
    assert compose["networks"]["store"] == {"internal": True}
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    variables = services["loraplex"]["environment"]
    names = {name.removeprefix(ENV_PREFIX).lower() for name in variables}
    assert names <= Settings.model_fields.keys()
    assert services["loraplex"]["ulimits"] == {"memlock": -1}


def test_compose_mounts_files_that_there_are(compose: dict) -> None:
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).is_dir(), volume
            else:
                assert source in compose["volumes"]
    for file in ("compose.yml", "compose.cuda.yml"):
        for service in yaml.safe_load((DOCKER / file).read_text())["services"].values():
            if "build" in service:
                assert (DOCKER / "../.." / service["build"]["dockerfile"]).is_file()
    targets = (ROOT / "deploy/prometheus/prometheus.yml").read_text()
    port = compose["services"]["loraplex"]["environment"]["LORAPLEX_METRICS_PORT"]
    assert f"127.0.0.1:{port}" in targets


def test_scripts_can_be_run() -> None:
    for script in ("deploy/first_token.sh", "deploy/kuberay/make_secrets.sh"):
        assert os.access(ROOT / script, os.X_OK)
