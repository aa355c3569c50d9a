"""The engine lock of a VM: one vCPU executes at a time, and an ioctl that changes memory stops them all.

The engine's atomics do not hold between two engines on the same memory, so vCPUs of one VM take turns. Who waits
makes the holder leave at its next block (through its kick flag): at once for an ioctl, after a time slice for another
vCPU. The gate keeps a leaver from overtaking the one it left for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kvmapi.model.signals import KickFlag

SLICE = 0.002  # seconds a vCPU may run while another waits
_RETRY = 0.01  # a kick that came between two starts is repeated


class EngineLock:
    """A lock whose holder can be asked to leave."""

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._lock = threading.Lock()
        self._holder: KickFlag | None = None
        self.turns = 0  # counts changes of hands: who finds another number than its own last one was not alone

    def acquire(self, kick: KickFlag | None = None, patience: float = 0.0) -> None:
        """Take the lock; after `patience` seconds make the holder leave. `kick`: the taker's own flag, cleared here."""
        with self._gate:
            if not self._lock.acquire(blocking=False) and not (patience and self._lock.acquire(timeout=patience)):
                while True:
                    holder = self._holder
                    if holder is not None:
                        holder[0] = 1
                    if self._lock.acquire(timeout=_RETRY):
                        break
            self.turns += 1
            self._holder = kick
            if kick is not None:
                kick[0] = 0

    def release(self) -> None:
        """Give it back."""
        self._holder = None
        self._lock.release()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No vCPU runs inside this block."""
        self.acquire()
        try:
            yield
        finally:
            self.release()
