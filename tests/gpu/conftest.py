"""Tests that need a CUDA device. One command runs them all, from the repository's root:

python -m pytest tests/gpu -m gpu
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
