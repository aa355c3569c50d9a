"""The page a vCPU shares with its VMM (struct kvm_run): where exits are written and answers read.

Layout facts: include/uapi/linux/kvm.h. The byte behind immediate_exit is padding there; here it is our own request to
leave the guest, beside the VMM's, so that one look sees both (cpu/stubs.py). The mapping is three pages: kvm_run, the
data page of port I/O, and the VM's ring of coalesced I/O (coalesced.py).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

from kvmapi.abi import kvm
from kvmapi.model.placeholder import StandIn, keeps_its_size

SIZE = 3 * mmap.PAGESIZE
PIO_OFFSET = mmap.PAGESIZE
RING_OFFSET = 2 * mmap.PAGESIZE
REQUEST_WINDOW, IMMEDIATE_EXIT, KICK, EXIT_REASON, READY, CR8, APIC_BASE, UNION = 0, 1, 2, 8, 12, 16, 24, 32
_REASON_AT, _UNION = EXIT_REASON >> 2, UNION >> 3  # indices for the hot path, in words
_UNION_2, _UNION_3 = _UNION + 1, _UNION + 2
_EXIT_IO = kvm.KVM_EXIT_IO
_REASON = struct.Struct("<I")
_MAP_FIXED = 0x10
_mmap = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64, use_errno=True
)(("mmap", ctypes.CDLL(None)))


class RunPage:
    """kvm_run in a memfd of its own, so that the VMM's mapping and ours are the same memory."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("sevmm:kvm_run", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, SIZE)
        keeps_its_size(self._fd)
        self.memory = mmap.mmap(self._fd, SIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.kick = memoryview(self.memory)[KICK : KICK + 1]
        self.u64 = memoryview(self.memory).cast("Q")
        self.u32 = memoryview(self.memory).cast("I")
        data = memoryview(self.memory)[PIO_OFFSET:RING_OFFSET]
        self.pio = {1: data, 2: data.cast("H"), 4: data.cast("I")}  # element 0: the data of one access, by its size
        self.ring = -1  # the memfd of the first vCPU, which has the VM's ring; -1 where this is that vCPU
        self.fault = kvm.KVM_EXIT_MEMORY_FAULT, kvm.KVM_MEMORY_EXIT_FLAG_PRIVATE  # RFC dialects have other numbers

    def map(self, length: int, prot: int, flags: int, offset: int) -> mmap.mmap:
        """The VMM's mapping; EINVAL beyond the area, as a fault there would be SIGBUS."""
        if offset + length > SIZE:
            raise OSError(22, "Invalid argument")
        mapping = mmap.mmap(self._fd, length, flags=flags, prot=prot, offset=offset)
        if self.ring >= 0 and length and offset + length > RING_OFFSET:
            self._show_ring(mapping, RING_OFFSET - offset, prot, flags)
        return mapping

    def _show_ring(self, mapping: mmap.mmap, at: int, prot: int, flags: int) -> None:
        """The ring's page in the place of our own, at `at` in the mapping, with which it goes."""
        where = ctypes.c_char.from_buffer(mapping) if prot & mmap.PROT_WRITE else None
        if where is not None:  # a mapping that is only read has no address that Python tells
            _mmap(ctypes.addressof(where) + at, mmap.PAGESIZE, prot, flags | _MAP_FIXED, self.ring, RING_OFFSET)

    def share(self) -> int:
        """Another fd of this memory, the caller's to close."""
        return os.dup(self._fd)

    def stand_in(self) -> StandIn:
        """Another process maps the very file."""
        return StandIn(os.dup(self._fd))

    def destroy(self) -> None:
        """The last holder is gone. The VMM's own mapping, if any is left, keeps its memory."""
        for view in (self.kick, self.u64, self.u32, self.pio[4], self.pio[2], self.pio[1]):
            view.release()
        self.memory.close()
        os.close(self._fd)

    # ---- writing exits
    def head(self, reason: int) -> int:
        """An exit without payload. Returns 0, the result of KVM_RUN."""
        _REASON.pack_into(self.memory, EXIT_REASON, reason)
        return 0

    def payload(self, reason: int, layout: str, *values: object) -> int:
        """An exit whose union member is `values` packed by `layout` from offset 32."""
        _REASON.pack_into(self.memory, EXIT_REASON, reason)
        struct.pack_into(layout, self.memory, UNION, *values)
        return 0

    def io(self, out: int, size: int, port: int, count: int) -> int:
        """KVM_EXIT_IO; the data stands at PIO_OFFSET."""
        words = self.u64
        self.u32[_REASON_AT] = _EXIT_IO
        words[_UNION] = out | size << 8 | port << 16 | count << 32
        words[_UNION_2] = PIO_OFFSET  # data_offset
        return 0

    def mmio(self, gpa: int, data: bytes, is_write: bool) -> int:
        """KVM_EXIT_MMIO of at most 8 bytes."""
        return self.payload(kvm.KVM_EXIT_MMIO, "<Q8sIB", gpa, data.ljust(8, b"\0"), len(data), is_write)

    def memory_fault(self, gpa: int, private: bool) -> int:
        """KVM_EXIT_MEMORY_FAULT of one page; KVM_RUN itself returns an errno with it."""
        self.u32[_REASON_AT], flag = self.fault
        words = self.u64
        words[_UNION], words[_UNION_2], words[_UNION_3] = flag if private else 0, gpa & -4096, 4096
        return 0

    def internal_error(self, suberror: int, *data: int) -> int:
        """KVM_EXIT_INTERNAL_ERROR with up to 16 words."""
        return self.payload(kvm.KVM_EXIT_INTERNAL_ERROR, f"<II{len(data)}Q", suberror, len(data), *data)

    # ---- reading answers
    @property
    def wants_exit(self) -> bool:
        """immediate_exit."""
        return bool(self.memory[IMMEDIATE_EXIT])

    def read(self, layout: str, offset: int) -> int:
        """One number the VMM may have written."""
        return int(struct.unpack_from(layout, self.memory, offset)[0])
