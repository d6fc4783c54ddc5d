"""What the interpreter can't tell: the kernels compile for a GPU, and fit its shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_every_kernel_compiles_for_a_hopper_gpu(tmp_path):
    case = Path(__file__).with_name("compile_case.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(case)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith(" kernels compiled\n"), done.stdout[-2000:]
