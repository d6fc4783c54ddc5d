"""Names become object-store keys and `model` values: a small alphabet, stated in the refusal."""

from __future__ import annotations

import pytest
from loraplex.adapter_store import InvalidName, check_name, split_version


@pytest.mark.parametrize("name", ["a", "0", "my-adapter_1.2", "a" * 63, "a-"])
def test_good_names(name: str) -> None:
    assert check_name(name) == name
    assert split_version(name) == (name, None)
    assert split_version(f"{name}@12") == (name, 12)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A",
        "-a",
        ".a",
        "_a",
        "a..b",
        "a.",
        "a/b",
        "a b",
        "a@1",
        "é",
        "a" * 64,
        "a\n",
        "a\0",
        "٣",
    ],
)
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidName, match=r"tenant name .* a name is 1 to 63 of"):
        check_name(name, "tenant")


@pytest.mark.parametrize("reference", ["a@", "a@0", "a@-1", "a@x", "a@1@2", "a@01", "A@1", "a@٣"])
def test_bad_references(reference: str) -> None:
    with pytest.raises(InvalidName):
        split_version(reference)
