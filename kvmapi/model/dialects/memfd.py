"""Memfds with MFD_INACCESSIBLE: the private memory of the RFC dialects, which user space can size, populate and punch.

The caller's fd is a placeholder that the kernel lets nobody read, write or map; the memory is a memfd of our own. One
file may be bound to slots of several VMs, and it outlives its fd while a slot has it. What is *populated* is a set of
pages here, because in one dialect it decides who gets an access; the memory behind comes into being on touch.

Lock order: `CHANGES`, then engine locks of VMs. Whoever changes what files hold or who has them takes it first, so
that two such changes never wait for each other's VMs.

Size: given once, by ftruncate(2) on the fd, which the model sees at the next call that needs it, or by the first
allocation. Source: Chao Peng's series, v5 patch 1 and v6 patch 3 (mm/shmem.c, mm/memfd.c).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from pyroaring import BitMap64

from kvmapi.abi import dialects as d
from kvmapi.model.caller import PAGE, Errno
from kvmapi.model.files import File
from kvmapi.model.guest_memfd import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, MAX_FILE, no_such_mode, real_fallocate

if TYPE_CHECKING:
    from kvmapi.model.dialects.vm import DialectVm
    from kvmapi.model.memslots import Slot

CHANGES = threading.Lock()
_F_ADD_SEALS = 1033
_SEAL, _SHRINK, _GROW, _WRITE = 1, 2, 4, 8
_FLAGS = os.MFD_CLOEXEC | d.MFD_ALLOW_SEALING | d.MFD_HUGETLB | d.MFD_INACCESSIBLE | d.MFD_HUGE_MASK << d.MFD_HUGE_SHIFT


def check_flags(flags: int) -> bool:
    """Do these flags of memfd_create ask for an inaccessible file? EINVAL for what the dialect's kernel does not know, and
    for one that is to be sealed or of huge pages.
    """
    if flags & ~_FLAGS:
        raise Errno(errno.EINVAL)
    if not flags & d.MFD_INACCESSIBLE:
        return False
    if flags & (d.MFD_ALLOW_SEALING | d.MFD_HUGETLB):
        raise Errno(errno.EINVAL)
    return True


class PrivateMemfd(File):
    """One inaccessible memfd. `bytes_` is 0 until it has a size, which then stays."""

    kind = "memfd"

    def __init__(self, name: str, close_on_exec: bool) -> None:
        super().__init__()
        self.bytes_ = 0
        self.populated: BitMap64 = BitMap64()
        self.bindings: list[Binding] = []
        self._name, self._flags = name, os.O_CLOEXEC if close_on_exec else 0
        self._shown = -1  # an fd of our own for the placeholder: its size is the file's
        self._fd = -1
        self._memory: mmap.mmap | None = None
        self._fixing = threading.Lock()

    def placeholder(self) -> int:
        """Sized by the caller's ftruncate, and closed to everything else: reading is EBADF, writing EPERM."""
        made = os.memfd_create(self._name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            fcntl.fcntl(made, _F_ADD_SEALS, _WRITE)
            shown = os.open(f"/proc/self/fd/{made}", os.O_WRONLY | self._flags)
            self._shown, made = made, -1
            if not self._flags:
                os.set_inheritable(shown, True)
            return shown
        finally:
            if made >= 0:
                os.close(made)

    def destroy(self) -> None:
        if self._memory is not None:
            self._memory.close()
        for fd in (self._shown, self._fd):
            if fd >= 0:
                os.close(fd)

    # ---- size and memory
    def size(self) -> int:
        """Bytes, 0 while it has none. EINVAL for a size that is no multiple of a page: ftruncate could not know."""
        if not self.bytes_:
            size = os.fstat(self._shown).st_size
            if size % PAGE:
                raise Errno(errno.EINVAL)
            if size:
                self._fix(size)
        return self.bytes_

    def resize(self, length: int) -> None:
        """ftruncate(2), where it comes through the seam: EINVAL, and EPERM for a file that has a size."""
        if length < 0:
            raise Errno(errno.EINVAL)
        with CHANGES:
            if self.size():
                raise Errno(errno.EPERM)
            if length % PAGE:
                raise Errno(errno.EINVAL)
            if length:
                self._fix(length)

    def _fix(self, size: int) -> None:
        """From now on the size stays."""
        with self._fixing:
            if self.bytes_:
                return
            try:
                if self._fd < 0:
                    self._fd = os.memfd_create("sevmm:private-memory", os.MFD_CLOEXEC)
                os.ftruncate(self._fd, size)
                self._memory = mmap.mmap(self._fd, size)
                os.ftruncate(self._shown, size)
            except (OSError, OverflowError, ValueError) as failure:
                raise Errno(errno.ENOMEM) from failure
            fcntl.fcntl(self._shown, _F_ADD_SEALS, _SEAL | _SHRINK | _GROW)
            self.bytes_ = size

    def memory(self) -> mmap.mmap:
        """The whole file mapped in our process (sparse). ENOMEM for one without size."""
        if not self.size() or self._memory is None:
            raise Errno(errno.ENOMEM)
        return self._memory

    def pointer(self, page: int) -> int:
        """Where a page of it stands in our process; the same as long as the file lives."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory())) + page * PAGE

    def has(self, page: int) -> bool:
        """Is the page populated?"""
        return page in self.populated

    # ---- what the caller may do with the fd
    def map(self, length: int, prot: int, flags: int, offset: int) -> mmap.mmap:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def allocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate, as shmem does it. Mode 0 gives a file without size one, and populates; PUNCH_HOLE frees.

        EINVAL: nothing, negative, or a hole or a new size that is not page-aligned; EOPNOTSUPP: other modes; EFBIG: the end
        wraps; EPERM: beyond the size that the file has.
        """
        if offset < 0 or length <= 0:
            raise Errno(errno.EINVAL)
        if no_such_mode(mode) or mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE):
            raise Errno(errno.EOPNOTSUPP)
        if offset + length > MAX_FILE:
            raise Errno(errno.EFBIG)
        with CHANGES:
            size = self.size()
            if mode & FALLOC_FL_PUNCH_HOLE:
                if offset % PAGE or length % PAGE:
                    raise Errno(errno.EINVAL)
                self._punch(offset // PAGE, min(offset + length, size) // PAGE)
                return
            if not mode & FALLOC_FL_KEEP_SIZE and offset + length > size:
                if size:
                    raise Errno(errno.EPERM)
                if (offset + length) % PAGE:
                    raise Errno(errno.EINVAL)
                self._fix(offset + length)
            self.populate(offset // PAGE, (min(offset + length, self.bytes_) + PAGE - 1) // PAGE)

    # ---- populating and punching, with CHANGES held
    def populate(self, first: int, end: int, held: DialectVm | None = None) -> None:
        """Pages [first, end) are there from now on. `held`: a VM that the caller has paused already."""
        if first < end and self.populated.range_cardinality(first, end) != end - first:
            with self._all_paused(held):
                self.populated.add_range(first, end)
                self._zap(first, end)

    def _punch(self, first: int, end: int) -> None:
        """Pages [first, end) are gone, and what they held with them: an SEV guest's frames notice at its next entry."""
        if first >= end:
            return
        with self._all_paused():
            self.populated.remove_range(first, end)
            real_fallocate(self._fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, first * PAGE, (end - first) * PAGE)
            self._zap(first, end)

    def _zap(self, first: int, end: int) -> None:
        for binding in self.bindings:
            binding.zap(first, end)

    @contextmanager
    def _all_paused(self, held: DialectVm | None = None) -> Iterator[None]:
        """No vCPU of any VM that has the file runs inside. Mirrors share a lock, which is taken once."""
        locks = [held.lock] if held is not None else []
        with ExitStack() as stack:
            for binding in self.bindings:
                if not any(binding.vm.lock is lock for lock in locks):
                    stack.enter_context(binding.vm.paused())
                    locks.append(binding.vm.lock)
            yield


class Binding:
    """The private half of one slot: what such a Slot has for its `gmem`."""

    mappable = False
    closed = False  # the slot holds the file, whatever becomes of the fd

    def __init__(self, vm: DialectVm, file: PrivateMemfd) -> None:
        self.vm = vm
        self.file = file
        self._slot: Slot | None = None

    @property
    def bytes_(self) -> int:
        """The file's size; 0 while it has none that memory could be made of."""
        try:
            return self.file.size()
        except Errno:
            return 0

    def memory(self) -> mmap.mmap:
        """All of the file in our process."""
        return self.file.memory()

    # Lists of bindings are replaced, never changed: a VM goes away without CHANGES.
    def bind(self, slot: Slot) -> None:
        """The slot is there."""
        self._slot = slot
        self.file.acquire()
        self.file.bindings = [*self.file.bindings, self]

    def unbind(self, slot: Slot) -> None:
        """The slot is gone."""
        if self._slot is not None:
            self._slot = None
            self.file.bindings = [binding for binding in self.file.bindings if binding is not self]
            self.vm.forget_window(self)
            self.file.release()

    def zap(self, first: int, end: int) -> None:
        """The file's pages [first, end) came or went: vCPUs look again."""
        slot = self._slot
        if slot is not None:
            low, high = max(first, slot.gmem_page), min(end, slot.gmem_page + slot.pages)
            if low < high:
                self.vm.physical.flush_range(slot.gfn + low - slot.gmem_page, high - low)
