"""GPUs, their driver, torch on them, and NCCL between them. torch is imported in a child only."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from .. import up_checks
from ..settings import Settings
from .check import Check

_TORCH_S = 120.0  # importing torch from a cold disk, and starting each GPU
_LEAST_CAPABILITY = (8, 0)  # bfloat16 and Triton's kernels

# Prints one JSON object. A group's ranks are processes; here one process drives all GPUs, which
# finds the same faults of driver and peer access.
_PROBE = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        x = torch.ones(256, 256, device=f"cuda:{i}")
        assert float((x @ x).sum()) == 256.0 ** 3
        found["gpus"].append(
            {"name": p.name, "bytes": p.total_memory, "capability": [p.major, p.minor]})
    import torch.cuda.nccl as nccl
    found["nccl"] = ".".join(map(str, nccl.version()))
    if len(found["gpus"]) > 1:
        n = len(found["gpus"])
        parts = [torch.full((1 << 20,), float(i + 1), device=f"cuda:{i}") for i in range(n)]
        nccl.all_reduce(parts)
        found["all_reduce"] = all(bool((p == n * (n + 1) / 2).all()) for p in parts)
print(json.dumps(found))
"""


def look_at_gpus(settings: Settings) -> Iterator[Check]:
    gpus = up_checks.gpu_count()
    if settings.device == "cpu" or (settings.device == "auto" and not gpus):
        yield Check("gpu", "skip", f"{gpus} GPUs here, device = {settings.device}: CPUs serve")
        return
    yield _driver()
    try:
        up_checks.choose_device(settings)
    except up_checks.CheckError as error:
        yield Check("gpu", "fail", f"{gpus} GPUs", str(error))
        return
    if not up_checks.torch_has_cuda():
        advice = "install torch without a CPU index; without it, CPUs serve"
        yield Check("gpu", "warn", f"{gpus} GPUs, but torch is built without CUDA", advice)
        return
    yield from judge(*_probe(), settings)


def _driver() -> Check:
    """nvidia-smi tells whether the driver works at all, before torch says so in its own words."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except FileNotFoundError:
        advice = "in a container: the NVIDIA Container Toolkit, with NVIDIA_DRIVER_CAPABILITIES=all"
        return Check("driver", "warn", "nvidia-smi isn't here", advice)
    except (subprocess.SubprocessError, OSError) as error:
        output = getattr(error, "stdout", None) or str(error)
        advice = "install the NVIDIA driver anew, or reboot; dmesg | grep -i nvrm has the reason"
        return Check("driver", "fail", " ".join(str(output).split())[:200], advice)
    return Check("driver", "ok", shown.stdout.split()[0])


def _probe() -> tuple[dict[str, Any] | None, str]:
    """What torch finds, or None and why not."""
    command = [sys.executable, "-c", _PROBE]
    try:
        shown = subprocess.run(
            command, capture_output=True, text=True, timeout=_TORCH_S, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"no end after {_TORCH_S:.0f} s"
    try:
        return json.loads(shown.stdout.splitlines()[-1]), ""
    except (ValueError, IndexError):
        lines = shown.stderr.strip().splitlines() or [f"exit code {shown.returncode}"]
        return None, lines[-1]


def judge(found: dict[str, Any] | None, reason: str, settings: Settings) -> Iterator[Check]:
    """Checks on what the child process printed; `reason` where it printed nothing."""
    if found is None:
        advice = (
            "the driver or peer access between GPUs is at fault; try again with "
            "NCCL_DEBUG=INFO, and NCCL_P2P_DISABLE=1 to see whether it is peer access"
        )
        yield Check("torch on the GPU", "fail", reason, advice)
        return
    gpus = found["gpus"]
    version = f"torch {found['torch']}, CUDA {found['cuda']}"
    if not gpus:
        advice = "the driver is too old for this CUDA, or the container has no GPU"
        yield Check("torch on the GPU", "fail", f"{version} finds no GPU", advice)
        return
    names = ", ".join(sorted({f"{g['name']} ({g['bytes'] / 1e9:.0f} GB)" for g in gpus}))
    yield Check("torch on the GPU", "ok", f"{version}: {len(gpus)} x {names}")
    old = [g for g in gpus if tuple(g["capability"]) < _LEAST_CAPABILITY]
    if old:
        capability = ".".join(map(str, old[0]["capability"]))
        advice = "use GPUs of compute capability 8.0 or higher (A100, L4, H100)"
        yield Check("compute capability", "fail", f"{old[0]['name']} has {capability}", advice)
    if settings.tp == 1:
        yield Check("nccl", "skip", f"{found['nccl']}; tp = 1 needs none")
    elif found.get("all_reduce"):
        yield Check("nccl", "ok", f"{found['nccl']}: an all-reduce over {len(gpus)} GPUs is right")
    else:
        advice = "NCCL_DEBUG=INFO says more; check /dev/shm and peer access (nvidia-smi topo -m)"
        yield Check("nccl", "fail", f"{found['nccl']}: the all-reduce is wrong", advice)
