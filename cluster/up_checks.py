"""What must be right before anything is started: each failure says what to do about it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from importlib import metadata, util
from pathlib import Path

import psutil

from .errors import ClusterError
from .settings import Settings

# Measured by benchmarks/idle_memory.py: everything but the worker groups, and one CPU group
# without its weights. Rounded up.
BASE_BYTES = 1_300_000_000
GROUP_BYTES = 550_000_000
DISK_BYTES = 1_000_000_000


class CheckError(ClusterError):
    """The machine or the settings can't carry the service; the message says what to change."""


def check_port(host: str, port: int) -> None:
    """Raises CheckError when somebody listens on it already, naming the process if possible."""
    if port == 0:
        return
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return
        except OSError as error:
            reason = error
    if reason.errno == errno.EADDRINUSE:
        raise port_in_use(host, port)
    raise CheckError(
        f"cannot listen on {host}:{port}: {reason.strerror or reason}. Choose another address "
        "with --host or LORAPLEX_HOST, or another port with --port or LORAPLEX_PORT"
    )


def port_in_use(host: str, port: int) -> CheckError:
    """The error to raise, with the process that has the port if it can be seen."""
    return CheckError(
        f"port {port} on {host} is in use{_user_of(port)}. Choose another with --port or "
        "LORAPLEX_PORT"
    )


def _user_of(port: int) -> str:
    try:
        for conn in psutil.net_connections("inet"):
            if conn.status == "LISTEN" and conn.laddr and conn.laddr.port == port and conn.pid:
                return f" by process {conn.pid} ({psutil.Process(conn.pid).name()})"
    except (psutil.Error, OSError):
        pass  # other users' processes can't be seen; the port's number is what matters
    return ""


def check_model_folder(path: Path, weights: bool = True) -> None:
    """Raises CheckError when `path` isn't a folder with a Hugging Face model and tokenizer.

    Args:
        weights: its weights are to be loaded, so they must be there.
    """
    where = "Give the folder of a Hugging Face model with --model or LORAPLEX_MODEL_PATH"
    if not path.is_dir():
        raise CheckError(f"the model folder {path} does not exist. {where}")
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            raise CheckError(f"the model folder {path} has no {name}. {where}")
    shards = sorted(path.glob("*.safetensors")) if weights else []
    if weights and not shards:
        raise CheckError(f"the model folder {path} has no *.safetensors file. {where}")
    for shard in shards:
        with shard.open("rb") as file:
            if file.read(7) == b"version":
                raise CheckError(
                    f"{shard} is a Git LFS pointer, not the weights. Run `git lfs pull` there"
                )


def model_bytes(path: Path) -> int:
    return sum(shard.stat().st_size for shard in path.glob("*.safetensors"))


def check_memory(settings: Settings, weights_bytes: int) -> None:
    """Raises CheckError when the service would hardly fit into the memory that is free now."""
    on_gpu = settings.device == "cuda"
    # float32 on CPU doubles bfloat16 weights.
    group = GROUP_BYTES + (0 if on_gpu else 2 * weights_bytes + (settings.rank_pool_bytes or 0))
    need = BASE_BYTES + settings.groups * settings.tp * group
    free = available_memory()
    if free < need:
        raise CheckError(
            f"about {need / 1e9:.1f} GB of memory are needed for {settings.groups} worker "
            f"group(s), {free / 1e9:.1f} GB are free. Stop other programs, or use fewer groups "
            "(--groups or LORAPLEX_GROUPS) or a smaller pool (LORAPLEX_POOL_BYTES)"
        )


def available_memory() -> int:
    """Bytes that can be had: the machine's, or those left in the control group if fewer."""
    free = psutil.virtual_memory().available
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            limit = Path(limit_file).read_text().strip()
            used = int(Path(used_file).read_text())
        except (OSError, ValueError):
            continue
        if limit.isdigit():
            free = min(free, max(0, int(limit) - used))
    return free


def check_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < DISK_BYTES:
        raise CheckError(
            f"{free / 1e9:.1f} GB are free on the disk of {folder}; at least "
            f"{DISK_BYTES / 1e9:.0f} GB are needed. Free some, or choose another folder with "
            "--data-dir or LORAPLEX_DATA_DIR"
        )


def gpu_count() -> int:
    """NVIDIA GPUs that this process may use, found without loading any driver library."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([item for item in visible.split(",") if item.strip() not in ("", "-1")])
    return len([name for name in _devices() if re.fullmatch(r"nvidia\d+", name)])


def _devices() -> list[str]:
    try:
        return os.listdir("/dev")
    except OSError:
        return []


def torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build; read from its files, as importing it is slow."""
    spec = util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    try:
        text = Path(spec.submodule_search_locations[0], "version.py").read_text()
    except OSError:
        return "+cpu" not in metadata.version("torch")
    return re.search(r"^cuda\b[^=]*=\s*['\"]", text, re.MULTILINE) is not None


def choose_device(settings: Settings) -> Settings:
    """Settles `device="auto"`.

    Raises:
        CheckError: a GPU was asked for and there are too few, or torch can't use them.
    """
    gpus = gpu_count()
    need = settings.groups * settings.tp
    if settings.device == "cpu" or (settings.device == "auto" and not gpus):
        return settings.changed(device="cpu")
    if not torch_has_cuda():
        if settings.device == "auto":
            return settings.changed(device="cpu")
        raise CheckError(
            f"LORAPLEX_DEVICE=cuda, but torch {metadata.version('torch')} is built without CUDA. "
            "Install it again without a CPU index"
        )
    # Groups that nobody asked for are as many as fit.
    asked = settings.device == "cuda" and "groups" in settings.model_fields_set
    if settings.tp > gpus or (asked and need > gpus):
        raise CheckError(
            f"{settings.groups} group(s) of {settings.tp} rank(s) need {need} GPUs, there are "
            f"{gpus}. Use fewer (--groups, --tp), or LORAPLEX_DEVICE=cpu"
        )
    return settings.changed(device="cuda", groups=min(settings.groups, gpus // settings.tp))
