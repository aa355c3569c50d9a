"""In-kernel I/O of one VM: accesses that the VM answers itself, without an exit: interrupt controllers, the PIT,
ioeventfds and coalesced I/O.

The vCPUs ask on every port write and MMIO access of a VM that has such devices, so the tables are replaced as a whole
and read without a lock. An eventfd that is taken off the bus stays open while a vCPU is signalling it: it closes with
its last reference.

Order of checks: kvm_assign_ioeventfd and kvm_deassign_ioeventfd in virt/kvm/eventfd.c.
"""

from __future__ import annotations

import errno
import struct
import threading
from typing import TYPE_CHECKING, NamedTuple

from kvmapi.abi import kvm
from kvmapi.model.caller import Caller, Errno
from kvmapi.model.eventfd import EventFd

if TYPE_CHECKING:
    from kvmapi.model.coalesced import CoalescedIo
    from kvmapi.model.irq.bus import InterruptBus

_LAYOUT = struct.Struct("<QQIiI36x")  # kvm_ioeventfd
SIZE = _LAYOUT.size
_CCW_NOTIFY = 1 << 3  # KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY: s390's bus, which no x86 guest reaches
_VALID = (1 << 5) - 1  # with the flag after it, which has a number in the kernel's list and no name
_LENGTHS = frozenset((0, 1, 2, 4, 8))


class IoEvent(NamedTuple):
    """An ioeventfd: `length` 0 means any, `match` None means any value."""

    length: int
    match: int | None
    event: EventFd

    def hit(self, data: bytes) -> bool:
        """Is this write meant?"""
        if not self.length:
            return True
        return len(data) == self.length and (self.match is None or int.from_bytes(data, "little") == self.match)

    def collides(self, other: IoEvent) -> bool:
        """Could one write at their address mean both?"""
        if not self.length or not other.length:
            return True
        return self.length == other.length and (self.match is None or other.match is None or self.match == other.match)


class KernelBus:
    """The devices on ports ("pio") and in memory ("mmio")."""

    def __init__(self) -> None:
        self.interrupts: InterruptBus | None = None  # with its IOAPIC
        self.coalesced: CoalescedIo | None = None  # since the VM has a zone
        self._mutex = threading.Lock()
        self._events: dict[tuple[str, int], tuple[IoEvent, ...]] = {}

    def write(self, space: str, address: int, data: bytes) -> bool:
        """A guest's store. True: done, no exit."""
        for entry in self._events.get((space, address), ()):
            if entry.hit(data):
                entry.event.signal()
                return True
        if self.coalesced is not None and self.coalesced.write(space == "pio", address, data):
            return True
        bus = self.interrupts
        if bus is not None and space == "pio":
            return bus.port_write(address, data)
        if bus is None or space != "mmio" or not bus.ioapic.owns(address):
            return False
        with bus:
            return bus.ioapic.write(address, data)

    def read(self, space: str, address: int, size: int) -> bytes | None:
        """A guest's load; None: nobody here, exit."""
        bus = self.interrupts
        if bus is not None and space == "pio":
            return bus.port_read(address, size)
        if bus is None or space != "mmio" or not bus.ioapic.owns(address):
            return None
        with bus:
            return bus.ioapic.read(address, size)

    def destroy(self) -> None:
        """The VM goes away: close the eventfds."""
        with self._mutex:
            self._events = {}
            self.interrupts = None

    # ---- KVM_IOEVENTFD
    def ioeventfd(self, data: bytes, caller: Caller) -> None:
        """struct kvm_ioeventfd: assign or deassign."""
        match, address, length, fd, flags = _LAYOUT.unpack(data)
        wanted = match if flags & kvm.KVM_IOEVENTFD_FLAG_DATAMATCH else None
        space = _space(flags)
        if flags & kvm.KVM_IOEVENTFD_FLAG_DEASSIGN:
            self._deassign((space, address), IoEvent(length, wanted, caller.eventfd(fd)))
            return
        if length not in _LENGTHS or address + length >= 1 << 64 or flags & ~_VALID or (not length and wanted is not None):
            raise Errno(errno.EINVAL)
        self._assign((space, address), IoEvent(length, wanted, caller.eventfd(fd)))

    def _assign(self, key: tuple[str, int], new: IoEvent) -> None:
        with self._mutex:
            there = self._events.get(key, ())
            if any(new.collides(other) for other in there):
                raise Errno(errno.EEXIST)
            self._events = {**self._events, key: (*there, new)}

    def _deassign(self, key: tuple[str, int], wanted: IoEvent) -> None:
        with self._mutex:
            there = self._events.get(key, ())
            kept = tuple(entry for entry in there if entry[:2] != wanted[:2] or entry.event.key != wanted.event.key)
            if len(kept) == len(there):
                raise Errno(errno.ENOENT)
            events = {**self._events, key: kept}
            if not kept:
                del events[key]
            self._events = events


def _space(flags: int) -> str:
    if flags & kvm.KVM_IOEVENTFD_FLAG_PIO:
        return "pio"
    return "ccw" if flags & _CCW_NOTIFY else "mmio"
