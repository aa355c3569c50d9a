"""`GuestMemfd`: a file of guest-private memory. User space can size, populate and punch it, not read or write it."""

from __future__ import annotations

import mmap

from kvmapi.descriptor import Descriptor
from kvmapi.host import MAP_SHARED, PROT_READ_WRITE, Host

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02


class AllocatedFile(Descriptor):
    """A file whose pages are populated and punched with fallocate."""

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        try:
            self.host.fallocate(self.fd, mode, offset, length)
        except OSError as error:
            raise self.call_error("fallocate", error, mode=mode, offset=offset, length=length) from error


class GuestMemfd(AllocatedFile):
    """The fd of KVM_CREATE_GUEST_MEMFD; `size` and offsets in bytes, multiples of 4 KiB.

    The file holds its VM: the VM lives until the file is closed too. Closing it unbinds it from its slots, and a
    private access there then ends KVM_RUN with EFAULT.
    """

    on = "guest_memfd"

    def __init__(self, host: Host, fd: int, size: int, flags: int = 0) -> None:
        super().__init__(host, fd)
        self.size = size
        self.flags = flags

    def allocate(self, offset: int, length: int) -> None:
        """Populate [offset, offset+length); beyond the file's size is EINVAL."""
        self._fallocate(FALLOC_FL_KEEP_SIZE, offset, length)

    def punch_hole(self, offset: int, length: int) -> None:
        """Free [offset, offset+length) and zap the guest's mappings; the next access sees zeroes."""
        self._fallocate(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, offset, length)

    def mmap(self, length: int | None = None, offset: int = 0) -> mmap.mmap:
        """Map the file, if it was made with GUEST_MEMFD_FLAG_MMAP (ENODEV otherwise).

        Touching a page of a file without INIT_SHARED raises SIGBUS, which ends the process.
        """
        size = self.size - offset if length is None else length
        try:
            return self.host.mmap(self.fd, size, PROT_READ_WRITE, MAP_SHARED, offset)
        except OSError as error:
            raise self.call_error("mmap", error, length=size, offset=offset) from error
