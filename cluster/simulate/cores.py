"""Cores that the groups of one machine share: who computes beside others takes longer."""

from __future__ import annotations

from typing import Protocol

from .hardware import Hardware


class Sharer(Protocol):
    def pace_changed(self) -> None: ...


class Cores:
    """Counts who computes. A step keeps the pace that it began with; those after it don't."""

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._shared = len(hardware.slowdown) > 1
        self._computing: dict[Sharer, None] = {}

    @property
    def slowed(self) -> float:
        """How many times as long things take now."""
        return self._hardware.slowed(len(self._computing))

    def busy(self, sharer: Sharer) -> float:
        """It computes from now on. Returns how many times as long that takes."""
        if self._shared and sharer not in self._computing:
            self._tell()
            self._computing[sharer] = None
        return self.slowed

    def idle(self, sharer: Sharer) -> None:
        """It has nothing to compute."""
        if self._computing.pop(sharer, self) is None:
            self._tell()

    def _tell(self) -> None:
        for other in self._computing:
            other.pace_changed()
