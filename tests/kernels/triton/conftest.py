"""The interpreter at more than twice its speed."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True, scope="module")
def _fast_interpreter() -> Iterator[None]:
    """A launch makes `triton.language` interpret, and so does every call of a helper, again. Here
    the launch does it for the helpers too. Integer operations are also computed in 64 bits, and
    what was found is thrown away: that is left out."""
    patch, builder = interpreter._patch_lang, interpreter.interpreter_builder
    seen_by_all = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch_once(fn):
        return patch(seen_by_all)

    def call(self, *args, **kwargs):
        return self.rewrite()(*args, **kwargs)

    with (
        mock.patch.object(interpreter, "_patch_lang", patch_once),
        mock.patch.object(interpreter.InterpretedFunction, "__call__", call),
        mock.patch.object(builder, "options", replace(builder.options, sanitize_overflow=False)),
    ):
        yield
