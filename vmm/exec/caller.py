"""The traced program as the model sees it during a system call (kvmapi.model.caller's protocols).

Copies go through process_vm_readv and process_vm_writev on the waiting thread's process: they honour page protections, so
wild pointers give EFAULT as in the kernel. What the guest itself uses is mapped here (ram.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from typing import TYPE_CHECKING

from kvmapi.model.caller import Errno, ProcessMemory, Stoppable, memlock_limit
from kvmapi.model.eventfd import EventFd, held_eventfd
from kvmapi.model.files import File, Foreign
from vmm.exec.memory.ram import Ram
from vmm.exec.pidfd import copy_fd_of, living

if TYPE_CHECKING:
    from vmm.exec.files import FileTable
    from vmm.exec.memory.remap import Tracer
    from vmm.exec.notify import Listener

_FOREIGN = Foreign()


class RemoteMemory(ProcessMemory):
    """The address space of a traced process."""

    elsewhere = True

    def __init__(self, tgid: int, tracer: Tracer | None = None) -> None:
        super().__init__(tgid)
        self._tgid = tgid
        self.ram = Ram(tgid, tracer)
        self.pointer = self.ram.pointer
        self.standing = self.ram.standing
        self.accessible = self.ram.accessible
        self.reach = self.ram.reach
        self.enter = self.ram.enter
        self.leave = self.ram.leave
        self._users = 1  # the process, and every VM whose guests may still use what `pointer` said
        self._lock = threading.Lock()

    def _copy(self, function: object, local: int, address: int, size: int) -> int:
        done = super()._copy(function, local, address, size)
        if done < 0 and ctypes.get_errno() == errno.ESRCH:  # the thread has ended, others live on
            with contextlib.suppress(ProcessLookupError):
                self._pid = living(self._tgid)
                done = super()._copy(function, local, address, size)
        return done

    def watch(self, vm: Stoppable) -> None:
        """A VM whose guests use the memory."""
        with self._lock:
            self._users += 1
        self.ram.watch(vm)

    def unwatch(self, vm: Stoppable) -> None:
        """It is gone. What was mapped here stays until the last user has gone: a vCPU may still be running when its process
        has been killed, or has become another program.
        """
        self.retire()

    def retire(self) -> None:
        """One user less: a VM, or the process itself, which has ended or has another image now."""
        with self._lock:
            self._users -= 1
            last = not self._users
        if last:
            self.ram.close()

    def pinnable(self, address: int, size: int, write: bool = True, whole: bool = False) -> bool:
        """Could every page of [address, address+size) be pinned?"""
        return self.ram.pinnable(address, size, write, whole)


class Process:
    """One traced process: what belongs to its address space. A new program image gets a new object."""

    def __init__(self, tgid: int, tracer: Tracer | None = None) -> None:
        self.tgid = tgid
        self.leaving: set[int] = set()  # threads that have asked for another image, and may get it
        try:
            self.pidfd = os.pidfd_open(tgid)
        except OSError as failure:
            if failure.errno in (errno.EINVAL, errno.ENOENT):  # what the kernel says while a process is being reaped
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
            raise
        self._maps, self._image = -1, b""
        with contextlib.suppress(OSError):  # it has ended meanwhile
            self._maps, self._image = os.open(f"/proc/{living(tgid)}/maps", os.O_RDONLY | os.O_CLOEXEC), _image(tgid)
        self.memory = RemoteMemory(tgid, tracer)

    def same_image(self) -> bool:
        """Does it still run the program that it ran when this object was made? A file of the mappings of an address space that
        is gone is empty; and where others share that one (vfork), the new image has its stack elsewhere.
        """
        with contextlib.suppress(OSError):
            return self._maps >= 0 and os.pread(self._maps, 1, 0) != b"" and _image(self.tgid) == self._image
        return False

    def close(self) -> None:
        """The process has ended, or has another image now."""
        os.close(self.pidfd)
        if self._maps >= 0:
            os.close(self._maps)
        self.memory.retire()

    def memlock_limit(self) -> int | None:
        """RLIMIT_MEMLOCK in bytes, None when there is none or the process has CAP_IPC_LOCK."""
        with contextlib.suppress(OSError):
            return memlock_limit(self.tgid)
        return None


def _image(tgid: int) -> bytes:
    """Where its code and its stack begin: drawn by lot for each image. Raises OSError."""
    with open(f"/proc/{living(tgid)}/stat", "rb") as stat:
        return b" ".join(stat.read().rpartition(b")")[2].split()[23:26])


class Call:
    """One system call of a traced program that waits for our answer: kvmapi.model.caller.Caller."""

    __slots__ = ("_files", "_listener", "access", "close_on_exec", "id", "ip", "made", "memory", "process", "thread")

    def __init__(self, listener: Listener, files: FileTable, process: Process, identity: int, tid: int, ip: int) -> None:
        self._listener = listener
        self._files = files
        self.process = process
        self.memory = process.memory
        self.id = identity
        self.thread = tid
        self.ip = ip
        self.close_on_exec = True  # as every fd of KVM is
        self.access: int | None = None  # how the program opens a device
        self.made: File | None = None  # what the call gave the program an fd for

    def file(self, fd: int) -> File:
        """The model's file behind the program's `fd`, or a Foreign one."""
        found = self._files.look_up(self.process.tgid, self.thread, fd)
        return found.file if found is not None else _FOREIGN

    def install(self, file: File) -> int:
        """Give the program an fd for `file`."""
        fd = self._files.install(self._listener, self, file)
        self.made = file
        return fd

    def eventfd(self, fd: int) -> EventFd:
        """The program's eventfd."""
        try:
            ours = copy_fd_of(self.process.tgid, self.thread, fd)
        except OSError as failure:
            raise Errno(failure.errno or errno.EBADF) from None
        return held_eventfd(ours)

    def memlock_limit(self) -> int | None:
        """Its pin limit."""
        return self.process.memlock_limit() if self._files.memlock else None
