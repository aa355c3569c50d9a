"""A time limit for vCPUs that a test runs itself: whoever waits too long for a guest is kicked out of KVM_RUN.

One thread per machine, started with the first wait and ended by `close`. A wait costs a lock and a dictionary entry, so a test may wait
thousands of times a second.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

_AGAIN = 0.01  # a kick may come just before KVM_RUN sleeps, so it is repeated


class Watch:
    """Waits by vCPU; `kick(vcpu, thread)` is called for one whose time is over, again and again until it is left."""

    def __init__(self, kick: Callable[[int, int], None]) -> None:
        self._kick = kick
        self._waits: dict[int, tuple[float, int]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._wakes = math.inf
        self._thread: threading.Thread | None = None

    def enter(self, vcpu: int, seconds: float) -> float:
        """The calling thread runs `vcpu` from now on, for at most `seconds`; returns the deadline (monotonic)."""
        deadline = time.monotonic() + seconds
        with self._changed:
            if vcpu in self._waits:
                raise ValueError(f"vCPU {vcpu} is run by another thread already")
            self._waits[vcpu] = (deadline, threading.get_native_id())
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name="selftest-watch", daemon=True)
                self._thread.start()
            if deadline < self._wakes:  # mostly it is not: the thread finds out when it wakes for an earlier wait
                self._changed.notify()
        return deadline

    def leave(self, vcpu: int) -> None:
        """It does not any more."""
        with self._changed:
            self._waits.pop(vcpu, None)

    def expire(self, vcpu: int) -> None:
        """The time of `vcpu` is over now; nothing happens if nobody runs it."""
        with self._changed:
            if vcpu in self._waits:
                self._waits[vcpu] = (0.0, self._waits[vcpu][1])
                self._changed.notify()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _main(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                late = [(vcpu, thread) for vcpu, (deadline, thread) in self._waits.items() if deadline <= now]
                for vcpu, thread in late:
                    self._kick(vcpu, thread)
                self._wakes = min((deadline for deadline, _ in self._waits.values()), default=math.inf)
                self._changed.wait(_AGAIN if late else None if self._wakes == math.inf else max(0.0, self._wakes - now))
