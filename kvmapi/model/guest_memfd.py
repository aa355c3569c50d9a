"""guest_memfd: guest memory without a user mapping (KVM_CREATE_GUEST_MEMFD).

The memory is a memfd that only the model knows; the caller's fd is a placeholder of the same size. So a read, a write
or a mapping of that fd never shows a page. With GUEST_MEMFD_FLAG_MMAP the file can be mapped through the host seam:
with INIT_SHARED the mapping is the memory; without, it is a hole that raises SIGBUS, as the kernel's does. The file
keeps its VM alive; closing the fd unbinds its slots. Source: kvm-sev-uapi facts §4 (virt/kvm/guest_memfd.c).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.caller import PAGE, Errno
from kvmapi.model.files import File

if TYPE_CHECKING:
    from kvmapi.model.memslots import Slot
    from kvmapi.model.vm import VmFile

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, use_errno=True)(
    ("fallocate", _libc)
)


def real_fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its mode argument, which os.posix_fallocate lacks. Raises OSError."""
    if _fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def supported_flags(has_private_memory: bool) -> int:
    """KVM_CAP_GUEST_MEMFD_FLAGS of a VM: INIT_SHARED only where no private memory exists."""
    return kvm.GUEST_MEMFD_FLAG_MMAP | (0 if has_private_memory else kvm.GUEST_MEMFD_FLAG_INIT_SHARED)


class GuestMemfdFile(File):
    """One guest_memfd. `bytes_` is its fixed size."""

    kind = "guest_memfd"

    def __init__(self, vm: VmFile, size: int, flags: int) -> None:
        super().__init__()
        self.vm = vm
        self.bytes_ = size
        self.flags = flags
        self.closed = False
        self.bindings: list[Slot] = []
        self._memory: mmap.mmap | None = None
        self._fd = os.memfd_create("sevmm:guest-memory", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, size)
        except OSError as failure:
            os.close(self._fd)
            raise Errno(errno.ENOMEM) from failure
        vm.acquire()

    def size(self) -> int:
        return self.bytes_

    @property
    def mappable(self) -> bool:
        return bool(self.flags & kvm.GUEST_MEMFD_FLAG_MMAP)

    def memory(self) -> mmap.mmap:
        """The whole file mapped in our process (sparse). Errno(ENOMEM) if it does not fit the address space."""
        if self._memory is None:
            try:
                self._memory = mmap.mmap(self._fd, self.bytes_)
            except (OSError, OverflowError, ValueError) as failure:
                raise Errno(errno.ENOMEM) from failure
        return self._memory

    # ---- binding to memslots
    def check_binding(self, vm: VmFile, page: int, pages: int) -> None:
        """May [page, page+pages) be bound? EINVAL: other VM or beyond the end; EEXIST: overlaps a live binding."""
        if vm is not self.vm or (page + pages) * PAGE > self.bytes_:
            raise Errno(errno.EINVAL)
        for slot in self.bindings:
            if page < slot.gmem_page + slot.pages and slot.gmem_page < page + pages:
                raise Errno(errno.EEXIST)

    def bind(self, slot: Slot) -> None:
        self.bindings.append(slot)

    def unbind(self, slot: Slot) -> None:
        self.bindings = [bound for bound in self.bindings if bound is not slot]

    # ---- what the caller may do with the fd
    def map(self, length: int, prot: int, flags: int, offset: int) -> mmap.mmap:
        if not self.mappable:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if not flags & mmap.MAP_SHARED:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if self.flags & kvm.GUEST_MEMFD_FLAG_INIT_SHARED:
            return _map_beyond_end(self._fd, self.bytes_, length, prot, offset)
        empty = os.memfd_create("sevmm:private", os.MFD_CLOEXEC)  # every access beyond its end, that is everywhere, is SIGBUS
        try:
            return _map_beyond_end(empty, 0, length, prot, offset)
        finally:
            os.close(empty)

    def allocate(self, mode: int, offset: int, length: int) -> None:
        """Only KEEP_SIZE with or without PUNCH_HOLE; page-aligned; a hole may reach beyond the end, an allocation may
        not.
        """
        if offset < 0 or length <= 0:
            raise Errno(errno.EINVAL)
        if not mode & FALLOC_FL_KEEP_SIZE or mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE):
            raise Errno(errno.EOPNOTSUPP)
        if offset % PAGE or length % PAGE:
            raise Errno(errno.EINVAL)
        if mode & FALLOC_FL_PUNCH_HOLE:
            self._punch(offset, min(length, self.bytes_ - offset))
        elif offset + length > self.bytes_:
            raise Errno(errno.EINVAL)
        # Allocation reserves nothing here: the memfd behind is filled on first touch, with zeroes, as guest_memfd's
        # pages are.

    def _punch(self, offset: int, length: int) -> None:
        if length <= 0:
            return
        # No translation is void after this: the mapping stays and reads zeroes, for us and for every engine.
        real_fallocate(self._fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, offset, length)

    def last_fd_closed(self) -> None:
        with self.vm.paused():
            self.closed = True
            self.bindings.clear()
            self.vm.mappings_changed()

    def destroy(self) -> None:
        memory, self._memory = self._memory, None
        self.vm.forget_window(self)
        if memory is not None:
            memory.close()
        os.close(self._fd)
        self.vm.release()


def _map_beyond_end(fd: int, size: int, length: int, prot: int, offset: int) -> mmap.mmap:
    """Map [offset, offset+length) even where the file ends earlier: Python's mmap insists on a file that is long
    enough.
    """
    longer = offset + length > size
    if longer:
        os.ftruncate(fd, offset + length)
    try:
        return mmap.mmap(fd, length, flags=mmap.MAP_SHARED, prot=prot, offset=offset)
    finally:
        if longer:
            os.ftruncate(fd, size)
