"""The wheel holds everything, imports anywhere, and never shows a top-level `kernels`."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("adapter_store", "cluster", "kernels", "workers")
# What a folder may hold that isn't part of the package.
BY_PRODUCTS = {".pyc", ".pyo"}


def shipped_files() -> set[str]:
    """Every file of the four folders, by its path in the wheel."""
    files = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in BY_PRODUCTS:
                files.add(f"loraplex/{path.relative_to(ROOT).as_posix()}")
    return files


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", *FOLDERS):
        subprocess.run(["cp", "-r", ROOT / name, source / name], check=True)
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*build, "-w", out, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("*.whl")
    return made


def test_every_file_of_the_four_folders_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert shipped_files() - names == set()


def test_the_wheel_has_nothing_beside_the_four_folders(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {n for n in names if ".dist-info/" not in n} - shipped_files() == set()


def test_every_folder_with_modules_is_a_listed_package() -> None:
    listed = set(project()["tool"]["setuptools"]["packages"])
    mapped = project()["tool"]["setuptools"]["package-dir"]
    for path in sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")):
        folder = path.parent.relative_to(ROOT).as_posix()
        package = f"loraplex.{folder.replace('/', '.')}"
        assert package in listed, f"pyproject.toml doesn't list {package}"
        assert mapped.get(package) == folder, f"package-dir doesn't map {package}"


def test_the_installed_wheel_imports_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    (site,) = home.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    # The test environment's packages, without its .pth files: the editable install stays out.
    borrowed = importlib.util.find_spec("torch")
    assert borrowed is not None
    assert borrowed.origin is not None
    (site / "borrowed.pth").write_text(str(Path(borrowed.origin).parents[1]) + "\n")
    code = (
        "import loraplex.adapter_store, loraplex.cluster.cli, loraplex.kernels, loraplex.workers\n"
        "import loraplex.cluster.settings as s; print(s.__file__)"
    )
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve().is_relative_to(site.resolve())


def test_kernels_is_not_a_top_level_package() -> None:
    # transformers would take ours for the package of that name.
    assert importlib.util.find_spec("kernels") is None
    assert str(ROOT) not in sys.path
    assert "" not in sys.path


LIGHT = ("cluster.gateway.app", "cluster.control.actor", "cluster.cli", "cluster.serve_app")


@pytest.mark.parametrize("module", [*LIGHT, "adapter_store", "workers"])
def test_gateway_controller_and_command_line_import_no_torch(module: str, tmp_path: Path) -> None:
    code = (
        f"import sys, loraplex.{module}\n"
        "heavy = {'torch', 'triton', 'transformers', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["adapter_store", "kernels", "workers"])
def test_only_cluster_needs_ray(module: str, tmp_path: Path) -> None:
    code = f"import sys, loraplex.{module}; assert 'ray' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


IMPORT = re.compile(r"^\s*from\s+(\.+)([\w.]*)\s+import|^\s*import\s+(ray)\b|^\s*from\s+(ray)\b")
MAY_IMPORT = {
    "kernels": set(),
    "adapter_store": set(),
    "workers": {"kernels", "adapter_store"},
    "cluster": {"workers", "adapter_store"},
}


def test_imports_run_one_way_and_through_the_public_surface() -> None:
    wrong = []
    for path in sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")):
        relative = path.relative_to(ROOT)
        for number, line in enumerate(path.read_text().splitlines(), 1):
            match = IMPORT.match(line)
            if match is None:
                continue
            where = f"{relative}:{number}: {line.strip()}"
            if match[3] or match[4]:
                if relative.parts[0] != "cluster" and str(relative) != "workers/group.py":
                    wrong.append(where)
                continue
            up = len(match[1])
            if up != len(relative.parts):
                continue  # stays inside the folder
            target, _, inner = match[2].partition(".")
            if target not in MAY_IMPORT[relative.parts[0]] or inner:
                wrong.append(where)
    assert wrong == []


def dependencies() -> list[str]:
    meta = project()["project"]
    names = list(meta["dependencies"])
    for extra in meta["optional-dependencies"].values():
        names += extra
    return sorted({re.split(r"[\[<>=!~ ]", name)[0] for name in names} - {"loraplex"})


@pytest.mark.parametrize("name", dependencies())
def test_contributing_justifies_each_dependency(name: str) -> None:
    lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    assert any(f"`{name}`" in line and len(line) > len(name) + 20 for line in lines)


def test_every_dependency_is_bounded_from_below() -> None:
    meta = project()["project"]
    extras = meta["optional-dependencies"].values()
    for name in [*meta["dependencies"], *(n for extra in extras for n in extra)]:
        assert name.startswith("loraplex[") or ">=" in name, name
