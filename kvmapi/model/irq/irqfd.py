"""irqfds: eventfds that raise an interrupt when they are written.

One thread of the process waits for all of them (epoll) and raises the lines. It starts with the first irqfd and ends
with the last. An irqfd is found under the watcher's lock, which is held while its interrupt is raised: once deassign
returns, no interrupt comes from it any more.

The counter is emptied as the kernel empties it, by a read that does not block whatever the flags of the caller's fd
are; edge-triggered epoll reports the next write even where such a read is not possible. Nobody else should read it:
an event that is gone before the thread looks is lost. One eventfd serves one irqfd in the whole process (EBUSY).

A resampling irqfd holds its line until the guest ends the interrupt; then the line is let go and every resample
eventfd of the GSI is written. Order of checks: kvm_irqfd in virt/kvm/eventfd.c.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import threading
from collections.abc import Callable
from functools import partial

from kvmapi.abi import kvm
from kvmapi.model.caller import Caller, Errno
from kvmapi.model.eventfd import EventFd
from kvmapi.model.irq.message_bus import RESAMPLE_SOURCE, USER_SOURCE, MessageBus
from kvmapi.model.irq.threads import start_quiet

_LAYOUT = struct.Struct("<iIIi16x")  # kvm_irqfd
SIZE = _LAYOUT.size
_VALID = kvm.KVM_IRQFD_FLAG_DEASSIGN | kvm.KVM_IRQFD_FLAG_RESAMPLE


class Watcher:
    """The thread that waits for eventfds, and what to do for each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._actions: dict[int, tuple[EventFd, Callable[[], None]]] = {}  # by fd
        self._keys: set[int] = set()
        self._epoll: select.epoll | None = None
        self._wake: EventFd | None = None

    def add(self, event: EventFd, action: Callable[[], None]) -> None:
        """Call `action` whenever `event` is written, and now if its counter is not 0. Errno(EBUSY) for an eventfd that
        is watched already.
        """
        with self._lock:
            if event.key in self._keys:
                raise Errno(errno.EBUSY)
            epoll = self._epoll or self._start()
            epoll.register(event.fd, select.EPOLLIN | select.EPOLLET)
            self._actions[event.fd] = (event, action)
            self._keys.add(event.key)

    def remove(self, event: EventFd) -> None:
        """Never again. When it returns, no action for it runs."""
        with self._lock:
            if self._actions.pop(event.fd, None) is None or self._epoll is None:
                return
            self._keys.discard(event.key)
            self._epoll.unregister(event.fd)
            if not self._actions and self._wake is not None:
                self._wake.signal()  # the thread ends
                self._epoll = self._wake = None

    def _start(self) -> select.epoll:
        epoll, wake = select.epoll(), EventFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), -1)
        epoll.register(wake.fd, select.EPOLLIN)
        self._epoll, self._wake = epoll, wake
        start_quiet("sevmm-irqfds", partial(self._main, epoll, wake))
        return epoll

    def _main(self, epoll: select.epoll, wake: EventFd) -> None:
        with epoll:
            while True:
                ready = epoll.poll()
                if any(fd == wake.fd for fd, _ in ready):
                    return
                for fd, _ in ready:
                    self._ready(epoll, fd)

    def _ready(self, epoll: select.epoll, fd: int) -> None:
        with self._lock:
            found = self._actions.get(fd) if epoll is self._epoll else None
            if found is not None:
                event, action = found
                event.consume()
                action()


WATCHER = Watcher()


def _forked() -> None:
    WATCHER.__init__()  # type: ignore[misc]  # the thread and the VMs are the parent's


os.register_at_fork(after_in_child=_forked)


class Irqfds:
    """The irqfds of one VM, by eventfd."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._assigned: dict[int, tuple[int, EventFd, EventFd | None]] = {}  # key: GSI, eventfd, resample eventfd

    def irqfd(self, data: bytes, bus: MessageBus | None, caller: Caller) -> None:
        """struct kvm_irqfd: assign or deassign."""
        fd, gsi, flags, resample_fd = _LAYOUT.unpack(data)
        if flags & ~_VALID:
            raise Errno(errno.EINVAL)
        if flags & kvm.KVM_IRQFD_FLAG_DEASSIGN:
            self._deassign(caller.eventfd(fd).key, gsi, bus)
            return
        if bus is None or (bus.split and flags & kvm.KVM_IRQFD_FLAG_RESAMPLE):  # nobody here hears when a line may fall
            raise Errno(errno.EINVAL)
        event = caller.eventfd(fd)
        resample = caller.eventfd(resample_fd) if flags & kvm.KVM_IRQFD_FLAG_RESAMPLE else None
        with self._mutex:
            if event.key in self._assigned:
                raise Errno(errno.EBUSY)
            self._assigned[event.key] = (gsi, event, resample)
            self._update_resamplers(gsi, bus)
            try:
                WATCHER.add(event, partial(_raise, bus, gsi, resample is not None))
            except (Errno, OSError):  # another VM has it, or no fd is left for the watcher
                del self._assigned[event.key]
                self._update_resamplers(gsi, bus)
                raise

    def _deassign(self, key: int, gsi: int, bus: MessageBus | None) -> None:
        """An eventfd that is not assigned to this GSI is no error."""
        with self._mutex:
            found = self._assigned.get(key)
            if found is None or found[0] != gsi or bus is None:
                return
            del self._assigned[key]
            WATCHER.remove(found[1])
            self._update_resamplers(gsi, bus)

    def _update_resamplers(self, gsi: int, bus: MessageBus) -> None:
        events = [resample for at, _, resample in self._assigned.values() if at == gsi and resample is not None]
        with bus:
            had = gsi in bus.resamplers
            if events:
                bus.resamplers[gsi] = partial(_signal_all, events)
            elif had:
                del bus.resamplers[gsi]
        if had and not events:
            bus.line(gsi, False, RESAMPLE_SOURCE)

    def destroy(self) -> None:
        """The VM goes away."""
        with self._mutex:
            for _, event, _ in self._assigned.values():
                WATCHER.remove(event)
            self._assigned = {}


def _raise(bus: MessageBus, gsi: int, resample: bool) -> None:
    if resample:
        bus.line(gsi, True, RESAMPLE_SOURCE)
        return
    bus.line(gsi, True, USER_SOURCE)
    bus.line(gsi, False, USER_SOURCE)


def _signal_all(events: list[EventFd]) -> None:
    for event in events:
        event.signal()
