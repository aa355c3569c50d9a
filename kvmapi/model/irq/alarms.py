"""One thread that wakes vCPUs when a timer of theirs is due while they are in the guest or asleep in HLT.

It does nothing but call `poke` at the time: the vCPU's own thread then finds the timer due and raises the interrupt
(`Lapic.expire`). A vCPU that is outside KVM_RUN loses nothing, because it looks at its deadline when it enters.

There is at most one alarm per local APIC. The thread starts with the first alarm and ends when the last interrupt
controller of the process is gone. A forked child starts without alarms: the VMs are its parent's.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Protocol

from kvmapi.model.irq.threads import start_quiet

_NS = 1_000_000_000
_LONGEST = 3600.0  # seconds; a timer further away is looked at again then


class Sleeper(Protocol):
    """Whose alarm it is."""

    def ring(self) -> None:
        """It is time. Called without locks of this module."""


class Alarms:
    """The alarms of this process. Times are CLOCK_MONOTONIC in nanoseconds."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._due: dict[Sleeper, int] = {}
        self._users = 0
        self._sleeps_until = 0  # 0: not asleep, or until woken
        self._running = False

    def open(self) -> None:
        """One more interrupt controller may set alarms."""
        with self._changed:
            self._users += 1

    def close(self) -> None:
        """It is gone; the thread ends with the last one."""
        with self._changed:
            self._users -= 1
            if not self._users:
                self._due.clear()
                self._changed.notify()

    def set(self, sleeper: Sleeper, due: int | None) -> None:
        """Ring at `due`, instead of when it was to ring before; None: not at all."""
        with self._changed:
            if due is None or not self._users:
                self._due.pop(sleeper, None)
                return
            self._due[sleeper] = due
            if not self._running:
                self._running = True
                start_quiet("sevmm-apic-timers", self._main)
            elif not self._sleeps_until or due < self._sleeps_until:
                self._changed.notify()

    def _main(self) -> None:
        while True:
            with self._changed:
                if not self._users:
                    self._running = False
                    return
                ringing = self._take_due(time.monotonic_ns())
                if not ringing:
                    self._sleep()
            for sleeper in ringing:
                sleeper.ring()
            ringing.clear()  # hold nobody while asleep

    def _take_due(self, now: int) -> list[Sleeper]:
        ringing = [sleeper for sleeper, due in self._due.items() if due <= now]
        for sleeper in ringing:
            del self._due[sleeper]
        return ringing

    def _sleep(self) -> None:
        first = min(self._due.values(), default=None)
        if first is None:
            self._sleeps_until = 0
            self._changed.wait()
            return
        self._sleeps_until = first
        self._changed.wait(min((first - time.monotonic_ns()) / _NS, _LONGEST))
        self._sleeps_until = 0


ALARMS = Alarms()


def _forked() -> None:
    ALARMS.__init__()  # type: ignore[misc]  # its lock may have been held by a thread that the child does not have


os.register_at_fork(after_in_child=_forked)
