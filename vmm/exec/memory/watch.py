"""Noticing that a traced process has changed its mappings under a guest: munmap, mremap, mprotect, a new mapping.

The kernel tells KVM at once. Here the mappings that guests use are looked at when a vCPU enters, unless that has just
been done, and while one runs: so a change reaches a running guest after 10 ms, and one that is about to run after 1 ms.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from time import monotonic
from weakref import WeakSet

from kvmapi.model.caller import Stoppable
from vmm.exec.memory.maps import Area, Maps

LOOK = 0.01  # seconds between two looks while vCPUs run
FRESH = 0.001  # seconds for which a look is good enough for a vCPU that enters
_IDLE = 100  # looks without a running vCPU, after which the watcher's thread ends
MOST = 256  # mappings that are looked at


class Watch:
    """What one process's guests use of it. `changed` is told which ranges are not what they were."""

    def __init__(self, maps: Maps, lock: threading.RLock, changed: Callable[[list[tuple[int, int]]], None]) -> None:
        self._maps = maps
        self._lock = lock
        self._changed = changed
        self._used: dict[int, tuple[int, Area | None]] = {}  # by start: its end, and the mapping
        self._vms: WeakSet[Stoppable] = WeakSet()
        self._inside: list[None] = []  # an element for each vCPU that is inside: to add or take one needs no lock
        self._looked = 0.0
        self._thread: threading.Thread | None = None
        self._closed = False

    def add_vm(self, vm: Stoppable) -> None:
        """Its vCPUs are stopped for a moment after a change."""
        with self._lock:
            self._vms.add(vm)

    def use(self, start: int, end: int, area: Area | None) -> None:
        """Guests use this mapping, or the hole [start, end). Under the lock."""
        if start in self._used or len(self._used) < MOST:
            self._used[start] = (end, area)

    def enter(self) -> None:
        """A vCPU enters."""
        self._inside.append(None)
        if monotonic() - self._looked > FRESH:
            self._look_again()

    def _look_again(self) -> None:
        with self._lock:
            if monotonic() - self._looked > FRESH:
                self.look()
            if self._thread is None and not self._closed:
                thread = threading.Thread(target=self._watch, name="mappings", daemon=True)
                with contextlib.suppress(RuntimeError):  # no more threads: a change is noticed when a vCPU enters
                    thread.start()
                    self._thread = thread

    def leave(self) -> None:
        """It has left."""
        self._inside.pop()

    def doubt(self) -> None:
        """A look is due before the next vCPU enters."""
        self._looked = 0.0

    def look(self) -> bool:
        """Has anything changed? Under the lock."""
        self._maps.forget()
        gone = []
        for start, (end, before) in self._used.items():
            now = self._maps.next(start)
            if (now is None or now.start >= end) if before is None else _still(before, now):
                continue
            gone.append((start, end))
        for start, _ in gone:
            del self._used[start]
        if gone:
            self._changed(gone)
        self._looked = monotonic()
        return bool(gone)

    def close(self) -> None:
        """The process has ended."""
        with self._lock:
            self._closed = True
            self._used.clear()

    def _watch(self) -> None:
        idle = 0
        while True:
            time.sleep(LOOK)
            with self._lock:
                idle = 0 if self._inside else idle + 1
                if self._closed or idle > _IDLE:
                    self._looked = 0.0  # whoever enters from here on looks, and starts another thread
                    if self._closed or not self._inside:
                        self._thread = None
                        return
                    idle = 0
                vms = list(self._vms) if self._inside and self.look() else []
            for vm in vms:
                with contextlib.suppress(OSError), vm.paused():
                    pass  # whoever enters afterwards sees that there was a change


def _still(before: Area, now: Area | None) -> bool:
    """Is the mapping what it was? It may have grown: neighbours that continue each other are one for the kernel."""
    if now is None or now.start > before.start or now.end < before.end:
        return False
    return now._replace(start=before.start, end=before.end, offset=now.offset + before.start - now.start) == before
