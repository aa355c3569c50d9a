"""The engine lock of a VM: one vCPU executes at a time, and an ioctl that changes memory stops them all.

The engine's atomics do not hold between two engines on the same memory, so vCPUs of one VM take turns. Who waits
makes the holder leave at its next block (through its kick flag): at once for an ioctl, after a time slice for another
vCPU. The gate keeps a leaver from overtaking the one it left for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from kvmapi.model.signals import KickFlag

SLICE = 0.002  # seconds a vCPU may run while another waits
_RETRY = 0.002  # a kick that came between two starts is repeated
_LOOK = 0.001  # seconds between two looks at whether a waiter still wants the lock


def _wait(lock: threading.Lock, seconds: float | None, leaving: Callable[[], bool] | None) -> bool:
    """Take `lock` within `seconds` (None: for ever), unless `leaving` becomes true."""
    if leaving is None:
        return lock.acquire(timeout=-1 if seconds is None else seconds)
    end = None if seconds is None else time.monotonic() + seconds
    while not leaving():
        left = _LOOK if end is None else min(_LOOK, end - time.monotonic())
        if left <= 0:
            return False
        if lock.acquire(timeout=left):
            return True
    return False


class EngineLock:
    """A lock whose holder can be asked to leave."""

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._lock = threading.Lock()
        self._is_queue, self._take, self._give = self._gate.locked, self._lock.acquire, self._lock.release
        self._holder: KickFlag | None = None
        self.turns = 0  # counts changes of hands: who finds another number than its own last one was not alone

    def acquire(self, kick: KickFlag | None = None, patience: float = 0.0, leaving: Callable[[], bool] | None = None) -> bool:
        """Take the lock; after `patience` seconds make the holder leave. `kick`: the taker's own flag, cleared here.
        `leaving` is asked every millisecond: once it is true the wait is given up, and False returned.
        """
        if self._is_queue() or not self._take(False):
            return self._queue(kick, patience, leaving)
        self.turns += 1
        self._holder = kick
        if kick is not None:
            kick[0] = 0
        return True

    def _queue(self, kick: KickFlag | None, patience: float, leaving: Callable[[], bool] | None) -> bool:
        """Somebody has the lock, or waits for it."""
        gate, lock = self._gate, self._lock
        if not gate.acquire(blocking=False) and not _wait(gate, None, leaving):
            return False
        try:
            if not lock.acquire(blocking=False) and not self._insist(patience, leaving):
                return False
            self.turns += 1
            self._holder = kick
            if kick is not None:
                kick[0] = 0
        finally:
            gate.release()
        return True

    def _insist(self, patience: float, leaving: Callable[[], bool] | None) -> bool:
        """Wait for the holder, and make it leave; False when the wait was given up."""
        while not _wait(self._lock, patience, leaving):
            if leaving is not None and leaving():
                return False
            patience = _RETRY
            holder = self._holder
            if holder is not None:
                with suppress(ValueError):  # it has left meanwhile, and is gone
                    holder[0] = 1
        return True

    def release(self) -> None:
        """Give it back."""
        self._holder = None
        self._give()

    @property
    def holder(self) -> KickFlag | None:
        """The kick flag of the vCPU that has the lock; None when nobody has it, or an ioctl."""
        return self._holder

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No vCPU runs inside this block."""
        self.acquire()
        try:
            yield
        finally:
            self.release()
