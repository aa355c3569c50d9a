"""guest_memfd: guest memory without a user mapping (KVM_CREATE_GUEST_MEMFD).

The memory is a memfd that only the model knows; the caller's fd is a placeholder of the same size, which refuses to be
read, written or truncated (placeholder.py). With GUEST_MEMFD_FLAG_MMAP the file can be mapped through the host seam:
with INIT_SHARED the mapping is the memory; without, it is a hole that raises SIGBUS, as the kernel's does. The file
keeps its VM alive. It is open while its fd or a mapping of it is; when the last of them is closed its slots are unbound.
Source: kvm-sev-uapi facts §4 (virt/kvm/guest_memfd.c).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from bisect import bisect_left
from contextlib import nullcontext
from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.caller import PAGE, Errno
from kvmapi.model.files import File
from kvmapi.model.placeholder import StandIn, closed_file, keeps_its_size, sealed_closed

if TYPE_CHECKING:
    from kvmapi.model.memslots import Slot
    from kvmapi.model.vm import VmFile

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
_OPERATIONS = (0x2, 0x8, 0x10, 0x20, 0x40, 0x80)  # punch, collapse, zero, insert, unshare, write zeroes
_NOT_KEEPING_SIZE = (0x8, 0x20, 0x80)
MAX_FILE = (1 << 63) - 1
_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, use_errno=True)(
    ("fallocate", _libc)
)


def real_fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its mode argument, which os.posix_fallocate lacks. Raises OSError."""
    if _fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def no_such_mode(mode: int) -> bool:
    """Does no file system take this combination (fs/open.c, vfs_fallocate)?"""
    operation, keep = mode & ~FALLOC_FL_KEEP_SIZE, mode & FALLOC_FL_KEEP_SIZE
    if operation and operation not in _OPERATIONS:
        return True
    return bool(operation in _NOT_KEEPING_SIZE and keep) or (operation == FALLOC_FL_PUNCH_HOLE and not keep)


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
        self._open = 1  # the fd and the mappings
        self._bindings: list[tuple[int, int, Slot]] = []  # (first page, pages, slot), by page; they do not overlap
        self._memory: mmap.mmap | None = None
        self._fd = os.memfd_create("sevmm:guest-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, size)
        except OSError as failure:
            os.close(self._fd)
            raise Errno(errno.ENOMEM) from failure
        vm.acquire()

    def placeholder(self) -> int:
        return closed_file(self.kind, self.bytes_)

    def stand_in(self) -> StandIn:
        """What can be mapped is mapped by the caller's own mmap: the memory itself, or a file without a page."""
        if not self.mappable:
            return sealed_closed(self.kind, self.bytes_)
        if self.flags & kvm.GUEST_MEMFD_FLAG_INIT_SHARED:
            keeps_its_size(self._fd)
            return StandIn(os.dup(self._fd), guarded=True)
        empty = os.memfd_create("sevmm:private", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        keeps_its_size(empty)
        return StandIn(empty, guarded=True)

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
    def check_range(self, vm: VmFile, page: int, pages: int) -> None:
        """May pages [page, page+pages) be bound at all? EINVAL: another VM's file, or beyond its end."""
        if vm is not self.vm or (page + pages) * PAGE > self.bytes_:
            raise Errno(errno.EINVAL)

    def check_unbound(self, page: int, pages: int) -> None:
        """EEXIST where a slot has one of these pages."""
        at = bisect_left(self._bindings, (page,))
        before = self._bindings[at - 1] if at else (0, 0)
        if before[0] + before[1] > page or (at < len(self._bindings) and self._bindings[at][0] < page + pages):
            raise Errno(errno.EEXIST)

    def bind(self, slot: Slot) -> None:
        at = bisect_left(self._bindings, (slot.gmem_page,))
        self._bindings.insert(at, (slot.gmem_page, slot.pages, slot))

    def unbind(self, slot: Slot) -> None:
        """Nothing to do when the file was closed before: then nothing is bound."""
        at = bisect_left(self._bindings, (slot.gmem_page,))
        if at < len(self._bindings) and self._bindings[at][2] is slot:
            del self._bindings[at]

    # ---- what the caller may do with the fd
    def map(self, length: int, prot: int, flags: int, offset: int) -> mmap.mmap:
        if not self.mappable:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if not flags & mmap.MAP_SHARED:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if self.flags & kvm.GUEST_MEMFD_FLAG_INIT_SHARED:
            return self._mapping(self._fd, self.bytes_, length, prot, offset)
        empty = os.memfd_create("sevmm:private", os.MFD_CLOEXEC)  # every access beyond its end, that is everywhere, is SIGBUS
        try:
            return self._mapping(empty, 0, length, prot, offset)
        finally:
            os.close(empty)

    def _mapping(self, fd: int, size: int, length: int, prot: int, offset: int) -> Mapping:
        """Map [offset, offset+length) even where the file ends earlier: Python's mmap insists on a file that is long
        enough.
        """
        longer = offset + length > size
        if longer:
            os.ftruncate(fd, offset + length)
        try:
            mapping = Mapping(fd, length, flags=mmap.MAP_SHARED, prot=prot, offset=offset)
        finally:
            if longer:
                os.ftruncate(fd, size)
        mapping.holds(self)
        return mapping

    def allocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate. EINVAL: nothing or negative; EOPNOTSUPP: no such mode; EFBIG: the end wraps; EOPNOTSUPP: another
        mode than KEEP_SIZE with or without PUNCH_HOLE; EINVAL: not page-aligned, or an allocation beyond the end (a hole may reach there).
        """
        if offset < 0 or length <= 0:
            raise Errno(errno.EINVAL)
        if no_such_mode(mode):
            raise Errno(errno.EOPNOTSUPP)
        if offset + length > MAX_FILE:  # the file system's own checks, before the file's
            raise Errno(errno.EFBIG)
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
        self.let_go()

    def hold(self) -> None:
        """A mapping of the file was made: it stays open."""
        self.acquire()
        with self._reference_lock:
            self._open += 1

    def let_go(self, *, wait: bool = True) -> None:
        """The fd or a mapping was closed; the last of them unbinds the slots, and private accesses fail from now on,
        or from the next entry on without `wait`.
        """
        with self._reference_lock:
            self._open -= 1
            last = not self._open
        if last:
            with self.vm.paused() if wait else nullcontext():
                self.closed = True
                self._bindings.clear()
                self.vm.mappings_changed()

    def destroy(self) -> None:
        memory, self._memory = self._memory, None
        self.vm.forget_window(self)
        if memory is not None:
            memory.close()
        os.close(self._fd)
        self.vm.release()


class Mapping(mmap.mmap):
    """A mapping of a guest_memfd, which keeps the file open until it is closed or collected."""

    _file: GuestMemfdFile | None = None

    def holds(self, file: GuestMemfdFile) -> None:
        file.hold()
        self._file = file

    def close(self) -> None:
        super().close()
        self._closed(wait=True)

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._closed(wait=False)  # whoever is interrupted by the collector may hold the VM's lock

    def _closed(self, wait: bool) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.let_go(wait=wait)
            file.release()
