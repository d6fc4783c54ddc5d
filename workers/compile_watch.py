"""Counts kernels that are compiled while requests wait: warm-up should leave none."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)


class CompileWatch:
    """Kernels that Triton compiled, or fetched from its cache on disk, since `start`."""

    def __init__(self) -> None:
        self.kernels: list[str] = []

    def start(self) -> None:
        """Hooks into Triton, which is imported here: only GPUs need it."""
        import triton.knobs

        triton.knobs.runtime.jit_post_compile_hook = self.note

    def note(self, *, fn: Any, repr: str, **_: Any) -> None:
        """Triton's hook after it compiled a kernel for arguments that it hadn't seen."""
        self.kernels.append(fn.name)
        log.warning("kernel %s was compiled while requests waited: %s", fn.name, repr)
