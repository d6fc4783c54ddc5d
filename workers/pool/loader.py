"""Loads of packs into the pool, in a thread beside the engine's.

What takes the host long is here: pages of a mapping that come from the disk, planning, launching.
One thread works on all loads, a stage at a time, always for the load that has least left: none
waits behind a large one, and however many there are, they share the same two buffers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .slot_tables import Row
from .stager import Moment, Stager, Transfer

_POLL_S = 0.0003  # a device says that it is done when it is asked
# Making the row takes longer than a layer of Qwen3-30B-A3B at rank 16 takes to be copied (0.65
# ms): with two on their way the device doesn't wait.
_ROW_AFTER = 2


@dataclass(frozen=True)
class Contents:
    """Of a pack, for one rank.

    Attributes:
        row: makes what the tables are to say.
        transfers: what is to be moved.
        pinned: from memory that the device copies from directly.
    """

    row: Callable[[], Row]
    transfers: Iterator[Transfer]
    pinned: bool


class Load:
    """A pack on its way to its pages. The engine's thread holds it; another one brings it."""

    def __init__(
        self,
        layers: Sequence[tuple[int, int]],
        make: Callable[[], Contents],
        fence: Moment,
    ):
        """
        Args:
            layers: index and bytes to be copied, about, of each layer, in order.
            make: called in the loader's thread.
            fence: what was launched before the pages were given out.
        """
        self.layers, self._coming = layers, {index for index, _ in layers}
        self.nbytes = self.left = sum(nbytes for _, nbytes in layers)
        self.row: Row | None = None
        self.pinned = False  # comes from memory that the device copies from directly
        self.error: BaseException | None = None
        self.cancelled = False
        self.seconds = 0.0  # from the first stage to the last one's arrival, once it is done
        # `make` holds the pack, whose memory must stay until the last copy has read it: who has a
        # load keeps it until it is done.
        self._make, self._fence = make, fence
        self._contents: Contents | None = None
        self._transfers: Iterator[Transfer] | None = None
        self._layers: dict[int, Moment] = {}
        self._last: Moment | None = None
        self._stages = 0  # launched
        self._progress = threading.Condition()
        self._ended = False
        self._began: Moment | None = None
        self._began_at = 0.0

    @property
    def launched(self) -> bool:
        """The host's part has ended: all is on its way, or the load has failed."""
        return self._ended

    @property
    def underway(self) -> bool:
        """Its first layer is on its way, and nothing has failed."""
        return bool(self._layers) and self.error is None

    @property
    def done(self) -> bool:
        """All is in its place, or the load has failed. Never blocks."""
        if not self.launched or not (self._last is None or self._last.query()):
            return False
        if not self.seconds and self._last is not None and self._began is not None:
            self.seconds = self._last.seconds_since(self._began)
        return True

    @property
    def elapsed(self) -> float:
        """Seconds since it began; 0: it hasn't."""
        return time.perf_counter() - self._began_at if self._began_at else 0.0

    def rest(self, seconds: float) -> None:
        """Waits until there is more on its way, or for so long; for a moment only when all is."""
        with self._progress:
            self._progress.wait(min(seconds, _POLL_S) if self._ended else seconds)

    def wait(self) -> None:
        """Waits until it is done. Raises what made it fail."""
        self.join_host()
        if self._last is not None:
            self._last.synchronize()

    def join_row(self) -> None:
        """Waits until `row` is known.

        Raises:
            What made the load fail.
        """
        with self._progress:
            self._progress.wait_for(lambda: self._ended or self.row is not None)
        if self.error is not None:
            raise self.error

    def join_host(self, layer: int | None = None) -> None:
        """Waits for the host's part of a layer, or of all. On rank 0 it is hardly ever waited for;
        other ranks may be slower than that.

        Raises:
            What made the load fail.
        """
        if not (self._ended or layer in self._layers):
            with self._progress:
                self._progress.wait_for(lambda: self._ended or layer in self._layers)
        if self.error is not None:
            raise self.error

    def join(self, layer: int | None = None) -> None:
        """Later launches of the current stream wait for the layer, or for all of it.

        Raises:
            What made the load fail.
        """
        if layer is not None and layer not in self._coming:
            return
        self.join_host(layer)
        moment = self._last if layer is None else self._layers.get(layer)
        if moment is not None:
            moment.wait()

    def cancel(self) -> None:
        """Ends it; returns when nothing more is read of the pack or written to the pages."""
        self.cancelled = True
        with self._progress:
            self._progress.wait_for(lambda: self._ended)
        if self._last is not None:
            self._last.synchronize()

    def _note_row(self) -> None:
        """Once, while bytes are on their way."""
        if self.row is None and self._contents is not None and not self.cancelled:
            self.row = self._contents.row()

    def advance(self, stager: Stager) -> bool:
        """Moves one stage; whether that was the last. The loader's thread calls it."""
        try:
            if self._contents is None or self._transfers is None:
                self._began, self._began_at = stager.begin(), time.perf_counter()
                self._contents = self._make()
                self.pinned, self._transfers = self._contents.pinned, self._contents.transfers
            transfer = None if self.cancelled else next(self._transfers, None)
            if transfer is not None:
                self._last = moment = stager.move(transfer, self._fence)
                self.left -= transfer.nbytes
                self._stages += 1
                if self._stages == _ROW_AFTER:
                    self._note_row()
                with self._progress:
                    if transfer.layer is not None:
                        self._layers[transfer.layer] = moment
                    self._progress.notify_all()
                return False
            self._note_row()
        except BaseException as error:
            self.error = error
        self._transfers = self._contents = None
        with self._progress:
            self._ended = True
            self._progress.notify_all()
        return True


class Loader:
    """Runs loads. Its thread lives while there are any."""

    def __init__(self, stager: Stager):
        self.stager = stager
        self._loads: list[Load] = []
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def start(self, load: Load) -> None:
        with self._lock:
            self._loads.append(load)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="adapter-loader", daemon=True
                )
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._loads:
                    self._thread = None
                    return
                load = min(self._loads, key=lambda load: load.left)
            if load.advance(self.stager):
                with self._lock:
                    self._loads.remove(load)
