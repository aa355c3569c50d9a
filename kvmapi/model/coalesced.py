"""Coalesced I/O: writes that user space need not hear of at once are kept in a ring that it reads when it likes.

A zone is a range of ports or of addresses without memory. A guest's write that lies in one goes into the VM's ring: a page
that every vCPU's mapping of kvm_run has as its third. One entry stays free, so that a full ring is not an empty one; a
write that finds the ring full exits, as it would without a zone. User space moves `first`, we move `last`; both are in
memory that it can write, so neither is believed. vCPUs of a VM run one at a time, which is all the locking the ring needs.

The ring's page belongs to the memory of the first vCPU's kvm_run. Mappings of other vCPUs made through the host seam show
it too; a traced program's own mmap of another vCPU shows a page where nothing arrives.
Source: virt/kvm/coalesced_mmio.c (7.3).
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple

from kvmapi.abi import ioctls
from kvmapi.model.caller import PAGE, Caller, Errno
from kvmapi.model.runpage import RING_OFFSET, RunPage

_ZONE = struct.Struct("<QII")  # kvm_coalesced_mmio_zone: address, size, pio
_ENTRY = struct.Struct("<QII8s")  # kvm_coalesced_mmio: address, length, pio, data
_WORDS_SIZE = 8  # first and last
ENTRIES = (PAGE - _WORDS_SIZE) // _ENTRY.size
_MAX_ZONES = 1000  # NR_IOBUS_DEVS
_U64 = 1 << 64


class Zone(NamedTuple):
    """[address, address+size)."""

    address: int
    size: int

    def holds(self, address: int, size: int) -> bool:
        """Does all of [address, address+size) lie in the zone? `size` is a C int there."""
        return size < 1 << 31 and self.address <= address and address + size <= min(self.address + self.size, _U64 - 1)


class CoalescedIo:
    """The zones and the ring of one VM."""

    def __init__(self, begun: Callable[[], None]) -> None:
        """`begun`: there is a zone now; the vCPUs are to ask us."""
        self._begun = begun
        self._mutex = threading.Lock()
        self._zones: tuple[tuple[Zone, ...], tuple[Zone, ...]] = ((), ())  # in memory, on ports; replaced as a whole
        self._fd = -1
        self._ring: mmap.mmap | None = None
        self._words: memoryview | None = None

    def handlers(self) -> dict[int, Callable[[int, Caller], int]]:
        """The VM's ioctls."""
        return {
            ioctls.KVM_REGISTER_COALESCED_MMIO: self._register,
            ioctls.KVM_UNREGISTER_COALESCED_MMIO: self._unregister,
        }

    def add_vcpu(self, page: RunPage) -> None:
        """A vCPU was made. The ring is in the first one's memory, and is shown in the mappings of the others."""
        if self._ring is None:
            self._fd = page.share()
            self._ring = mmap.mmap(self._fd, PAGE, offset=RING_OFFSET)
            self._words = memoryview(self._ring)[:_WORDS_SIZE].cast("I")
        else:
            page.ring = self._fd

    def destroy(self) -> None:
        """The VM goes away."""
        self._zones = ((), ())
        if self._words is not None and self._ring is not None:
            self._words.release()
            self._ring.close()
            os.close(self._fd)
            self._words = self._ring = None

    def write(self, ports: bool, address: int, data: bytes) -> bool:
        """A guest's store. True: it is in the ring, no exit."""
        for zone in self._zones[ports]:
            if zone.holds(address, len(data)):
                return self._keep(address, data, ports)
        return False

    def _keep(self, address: int, data: bytes, ports: bool) -> bool:
        words, ring = self._words, self._ring
        if words is None or ring is None:
            return False
        last = words[1]
        if last >= ENTRIES or (last + 1) % ENTRIES == words[0]:
            return False
        _ENTRY.pack_into(ring, _WORDS_SIZE + last * _ENTRY.size, address, len(data), ports, data)
        words[1] = (last + 1) % ENTRIES
        return True

    # ---- ioctls
    def _register(self, arg: int, caller: Caller) -> int:
        """EINVAL: neither memory nor ports; ENOSPC: too many zones."""
        zone, pio = _zone(arg, caller)
        with self._mutex:
            if len(self._zones[pio]) >= _MAX_ZONES:
                raise Errno(errno.ENOSPC)
            self._replace(pio, (*self._zones[pio], zone))
        self._begun()
        return 0

    def _unregister(self, arg: int, caller: Caller) -> int:
        """Every zone that holds the whole range goes; none need be there."""
        gone, pio = _zone(arg, caller)
        with self._mutex:
            self._replace(pio, tuple(zone for zone in self._zones[pio] if not zone.holds(gone.address, gone.size)))
        return 0

    def _replace(self, pio: int, zones: tuple[Zone, ...]) -> None:
        self._zones = (self._zones[0], zones) if pio else (zones, self._zones[1])


def _zone(arg: int, caller: Caller) -> tuple[Zone, int]:
    address, size, pio = _ZONE.unpack(caller.memory.read(arg, _ZONE.size))
    if pio > 1:
        raise Errno(errno.EINVAL)
    return Zone(address, size), pio
