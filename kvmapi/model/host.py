"""ModelHost: the system-call seam answered by the model, for callers in this process.

Each fd it hands out is a real one, a placeholder without content (placeholder.py): it cannot collide with other fds, it
can be passed where an fd number is expected, and a number that the caller closed and reused is noticed by its inode.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmapi.model.caller import Errno, OwnMemory, memlock_limit
from kvmapi.model.eventfd import EventFd, own_eventfd
from kvmapi.model.files import File, Foreign

if TYPE_CHECKING:
    from kvmapi.model.platform import Platform

DEVICES = ("/dev/kvm", "/dev/sev")


def device(platform: Platform, path: str, flags: int) -> File:
    """A new open of one of `DEVICES`; `flags` are open's. Errno(ENOENT): the machine has no SEV."""
    if path == "/dev/kvm":
        from kvmapi.model.system import KvmDevice

        return KvmDevice(platform)
    if not platform.has_sev:
        raise Errno(errno.ENOENT)
    from kvmapi.model.sev.device import SevDevice

    return SevDevice(platform, writable=flags & os.O_ACCMODE != os.O_RDONLY)


class ModelHost:
    """The software model as a Host (docs/seams.md §1). One instance is one machine: its own firmware, ASIDs and VMs."""

    name = "model"

    def __init__(self, platform: object | None = None) -> None:
        from kvmapi.model.platform import Platform

        self.platform = platform if isinstance(platform, Platform) else Platform()
        self.memory = OwnMemory()
        self.thread = 0  # calls are made by the thread that runs the model
        self._files: dict[int, tuple[File, int]] = {}
        self._foreign = Foreign()

    # ---- the seam
    def open(self, path: str, flags: int) -> int:
        """Open /dev/kvm or /dev/sev of the modelled machine; ENOENT for anything else."""
        if path not in DEVICES:
            raise FileNotFoundError(errno.ENOENT, "the model has /dev/kvm and /dev/sev only", path)
        try:
            return self.install(device(self.platform, path, flags))
        except Errno as failure:
            raise OSError(failure.number, os.strerror(failure.number), path) from None

    def close(self, fd: int) -> None:
        """Close one of the model's fds; another fd (a memfd, say) is closed as os.close does."""
        entry = self._files.pop(fd, None)
        os.close(fd)
        if entry is not None:
            entry[0].fd_closed()

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        """The result, or -errno. Never raises."""
        entry = self._files.get(fd)
        if entry is None:
            return self._not_ours(fd)
        return entry[0].ioctl(request, arg, self)

    def runner(self, fd: int) -> Callable[[], int]:
        """KVM_RUN on one vCPU without the look-ups of `ioctl`: the same answers, for run loops."""
        from kvmapi.model.vcpu import VcpuFile

        entry = self._files.get(fd)
        if entry is None or not isinstance(entry[0], VcpuFile):
            raise OSError(errno.EBADF, "not a vCPU of the model", fd)
        return entry[0].runner(self)

    def mmap(
        self,
        fd: int,
        length: int,
        prot: int = mmap.PROT_READ | mmap.PROT_WRITE,
        flags: int = mmap.MAP_SHARED,
        offset: int = 0,
    ) -> mmap.mmap:
        """Map a vCPU's kvm_run, a mappable guest_memfd, or an ordinary fd."""
        entry = self._files.get(fd)
        if entry is None:
            return mmap.mmap(fd, length, flags=flags, prot=prot, offset=offset)
        return entry[0].map(length, prot, flags, offset)

    def memfd_create(self, name: str, flags: int) -> int:
        """An ordinary memfd; in dialects that have MFD_INACCESSIBLE, one that user space cannot reach."""
        if self.platform.dialect.files == "memfd":
            from kvmapi.model.dialects import memfd

            try:
                if memfd.check_flags(flags):
                    return self.install(memfd.PrivateMemfd(name, close_on_exec=bool(flags & os.MFD_CLOEXEC)))
            except Errno as failure:
                raise OSError(failure.number, os.strerror(failure.number)) from None
        return os.memfd_create(name, flags)

    def ftruncate(self, fd: int, length: int) -> None:
        """ftruncate, for files whose size is the model's to give. (It sees what os.ftruncate does to the others, too.)"""
        from kvmapi.model.dialects.memfd import PrivateMemfd

        entry = self._files.get(fd)
        if entry is None or not isinstance(entry[0], PrivateMemfd):
            os.ftruncate(fd, length)
            return
        try:
            entry[0].resize(length)
        except Errno as failure:
            raise OSError(failure.number, os.strerror(failure.number)) from None

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """fallocate on a guest_memfd by its rules, on another fd by the kernel's."""
        entry = self._files.get(fd)
        if entry is None:
            from kvmapi.model.guest_memfd import real_fallocate

            real_fallocate(fd, mode, offset, length)
            return
        try:
            entry[0].allocate(mode, offset, length)
        except Errno as failure:
            raise OSError(failure.number, os.strerror(failure.number)) from None

    # ---- the caller's side of a system call (caller.Caller)
    def file(self, fd: int) -> File:
        """The model's file behind `fd`, or a Foreign one; Errno(EBADF) when nothing is open there."""
        entry = self._files.get(fd)
        try:
            inode = os.fstat(fd).st_ino
        except (OSError, OverflowError):
            raise Errno(errno.EBADF) from None
        return entry[0] if entry is not None and entry[1] == inode else self._foreign

    def install(self, file: File) -> int:
        """A new fd for `file`; the fd is its first holder."""
        try:
            fd = file.placeholder()
        except OSError as failure:
            file.release()
            raise Errno(failure.errno or errno.EMFILE) from None
        self._files[fd] = (file, os.fstat(fd).st_ino)
        return fd

    def eventfd(self, fd: int) -> EventFd:
        """An eventfd of this process."""
        return own_eventfd(fd)

    def memlock_limit(self) -> int | None:
        """RLIMIT_MEMLOCK of this process in bytes, or None: no limit, or the platform does not apply it."""
        return memlock_limit(os.getpid()) if self.platform.memlock else None

    def _not_ours(self, fd: int) -> int:
        try:
            os.fstat(fd)
        except (OSError, OverflowError):
            return -errno.EBADF
        return -errno.ENOTTY
