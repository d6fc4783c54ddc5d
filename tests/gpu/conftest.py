"""Tests that need a CUDA device, from the repository's root:

python -m pytest tests/gpu -m "gpu and not soak"
python -m pytest tests/gpu -m "gpu and soak"      (under compute-sanitizer)

Nothing above this folder is needed: `--confcutdir tests/gpu` leaves out what other tests import.
Most of the time goes into compiling, which pytest-xdist's `-n 6` spreads over processes.
"""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """References multiply in float32, not in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
