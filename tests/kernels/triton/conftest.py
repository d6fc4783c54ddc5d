"""The interpreter at almost twice its speed."""

from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True, scope="module")
def _language_is_patched_once_a_launch() -> Iterator[None]:
    """A launch makes `triton.language` interpret, and so does every call of a helper, again. Here
    the launch does it for the helpers too."""
    patch = interpreter._patch_lang
    seen_by_all = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch_once(fn):
        return patch(seen_by_all)

    def call(self, *args, **kwargs):
        return self.rewrite()(*args, **kwargs)

    with (
        mock.patch.object(interpreter, "_patch_lang", patch_once),
        mock.patch.object(interpreter.InterpretedFunction, "__call__", call),
    ):
        yield
