"""What each trapped system call becomes: a question to the model, or the kernel's own business.

Every handler ends the notification exactly once. The fd decides whose call it is: one that we gave (files.py) is the
model's, everything else the kernel's. An fd of the machine's own /dev/kvm that was opened under another name is refused
with ENODEV rather than silently used: results of two machines must not mix.

Sources: Documentation/virt/kvm/api.rst for the calls on KVM's fds; virt/kvm/guest_memfd.c for those on guest_memfds.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmapi.abi import ioctls
from kvmapi.model.caller import PAGE, Errno
from kvmapi.model.guest_memfd import GuestMemfdFile
from kvmapi.model.vm import VmFile
from vmm.exec import filter as calls
from vmm.exec.caller import Call, Process
from vmm.exec.fallthrough import is_kvm
from vmm.exec.files import Entry
from vmm.exec.names import Names
from vmm.exec.notify import Notification
from vmm.exec.paths import Fields, Paths, pack_stat
from vmm.exec.refusals import NO_THREADS

if TYPE_CHECKING:
    from vmm.exec.log import Pending
    from vmm.exec.supervisor import Supervisor

_REGIONS = (ioctls.KVM_SET_USER_MEMORY_REGION, ioctls.KVM_SET_USER_MEMORY_REGION2)
_ANSWERS = frozenset((ioctls.KVM_GET_API_VERSION, ioctls.KVM_CHECK_EXTENSION, ioctls.KVM_GET_VCPU_MMAP_SIZE))  # whatever was closed
_REGION = struct.Struct("<IIQQQ")
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)  # ours, and as good as the kernel's
_U32 = 0xFFFFFFFF
_RUN, _X86_64 = ioctls.KVM_RUN, calls.AUDIT_ARCH_X86_64

Handler = Callable[[Notification], None]


class Dispatcher:
    """Answers notifications. Any thread may call it; calls of one program thread come one at a time."""

    def __init__(self, supervisor: Supervisor, paths: Paths) -> None:
        self._up = supervisor
        self._files = supervisor.files
        self._processes = supervisor.processes
        self._listener = supervisor.listener
        self._proceed = supervisor.listener.proceed
        self._heard = supervisor.log is not None  # does anybody want to hear of calls?
        self.waiting: dict[int, int] = {}  # threads, by notification: a thread's next call may come before we are done with its last
        names = Names(supervisor, paths, self._guarded)
        self._handlers: dict[int, Handler] = {
            calls.IOCTL: self._ioctl,
            calls.MMAP: self._mmap,
            calls.FALLOCATE: self._fallocate,
            calls.MADVISE: self._madvise,
            calls.MREMAP: self._mremap,
            calls.EXECVE: self._exec,
            calls.EXECVEAT: self._exec,
            **dict.fromkeys(calls.OPENS, names.open),
            **dict.fromkeys(calls.ASKS, names.ask),
            **dict.fromkeys(calls.TRANSFERS, self._guarded),
            calls.FSTAT: self._guarded,
            calls.FTRUNCATE: self._guarded,
        }

        self._handlers_32: dict[int, Handler] = {
            calls.I386_IOCTL: lambda n: self._answer(n, -errno.ENOTTY),
            calls.I386_EXECVE: self._exec,
            calls.I386_EXECVEAT: self._exec,
            **dict.fromkeys((calls.I386_OPEN, calls.I386_OPENAT, calls.I386_OPENAT2), names.open_32),
        }

    def __call__(self, notification: Notification) -> None:
        """Answer one notification. Never raises."""
        self.waiting[notification.id] = notification.tid
        try:
            handlers = self._handlers if notification.arch == _X86_64 else self._handlers_32
            handlers.get(notification.nr, self._leave)(notification)
        except Errno as failure:
            self._answer(notification, -failure.number)
        except ProcessLookupError:  # killed meanwhile
            self._answer(notification, -errno.ESRCH)
        except OSError as failure:
            if failure.errno not in _SHORTAGES:
                self._up.internal_error()
            self._answer(notification, -(failure.errno or errno.EIO))
        except Exception as failure:
            if str(failure) == "can't start new thread":
                self._up.say_once(NO_THREADS)
                self._answer(notification, -errno.ENOMEM)
            else:
                self._up.internal_error()
                self._answer(notification, -errno.EIO)
        finally:
            del self.waiting[notification.id]

    def _answer(self, notification: Notification, result: int) -> None:
        self._listener.answer(notification.id, result)

    def _leave(self, notification: Notification) -> None:
        self._proceed(notification.id)

    # ---- fds
    def _call(self, n: Notification, process: Process) -> Call:
        return Call(self._listener, self._files, process, n.id, n.tid, n.ip)

    def _find(self, n: Notification, fd: int) -> tuple[Process, Entry | None]:
        process = self._processes.of(n.tid)
        try:
            return process, self._files.look_up(process.tgid, n.tid, fd & _U32)
        except ProcessLookupError:  # its number belongs to another process now
            process = self._processes.sure(n.tid)
            return process, self._files.look_up(process.tgid, n.tid, fd & _U32)

    def _ioctl(self, n: Notification) -> None:
        process, entry = self._find(n, n.a0)
        if entry is None:
            self._foreign_ioctl(n, process)
            return
        file, request = entry.file, n.a1 & _U32
        if request == _RUN and entry.is_vcpu and entry.owner is process and not self._heard:
            run = entry.run  # the hot path: KVM_RUN asks its caller for memory and thread, which are the same each time
            if run is None or run.thread != n.tid:
                run = entry.run = self._call(n, process)
            self._listener.answer(n.id, file.ioctl(request, n.a2, run))
            return
        call = self._call(n, process)
        record = self._up.begin(call, file, n)
        if file.belongs_to_mm and entry.owner is not process:
            result = -errno.EIO
        elif entry.is_vcpu:
            result = file.ioctl(request, n.a2, call)
        else:
            if request not in _ANSWERS:
                self._files.take_news()
            if request in _REGIONS and isinstance(file, VmFile):
                self._region(n, file, call, record)
                return
            result = file.ioctl(request, n.a2, call)
        if record is not None:
            self._up.end(record, result, file)
        self._listener.answer(n.id, result)

    def _region(self, n: Notification, file: VmFile, call: Call, record: Pending | None) -> None:
        """A slot: what it shows of private memory becomes shared with us before the model hears of it."""

        def action() -> int:
            result = file.ioctl(n.a1 & _U32, n.a2, call)
            if record is not None:
                self._up.end(record, result, file)
            return result

        ram = call.process.memory.ram
        ram.forget()
        try:
            _, _, _, size, address = _REGION.unpack(call.memory.read(n.a2, _REGION.size))
        except Errno:
            size = address = 0
        usable = size and not (size | address) % PAGE and address + size < 1 << 47
        if usable and ram.convertible(address, size):
            ram.convert(self._up.hold(call), address, size, action)
            self._up.ram_converted(ram.failure)
        else:
            self._answer(n, action())

    def _foreign_ioctl(self, n: Notification, process: Process) -> None:
        """An ioctl of KVM's kind on an fd that we did not give."""
        if not is_kvm(process.tgid, n.tid, n.a0 & _U32):
            self._proceed(n.id)
            return
        fallthrough = self._up.fallthrough
        if fallthrough is None:
            self._up.say_once("the program opened this machine's own KVM by another name than /dev/kvm: refused (ENODEV)")
            self._answer(n, -errno.ENODEV)
            return
        call = self._call(n, process)
        pending = self._up.begin(call, fallthrough, n)
        self._files.take_news()
        result = fallthrough.answer(call, n.a1 & _U32, n.a2)
        if pending is not None:
            self._up.end(pending, result, fallthrough)
        if result is None:
            self._proceed(n.id)
        else:
            self._answer(n, result)

    def _mmap(self, n: Notification) -> None:
        process, entry = self._find(n, n.a4)
        result = 0
        if entry is not None and not entry.is_vcpu:
            if not isinstance(entry.file, GuestMemfdFile) or not entry.file.mappable:
                result = -errno.ENODEV
            elif not n.a3 & calls.MAP_SHARED:
                result = -errno.EINVAL
        if entry is not None and self._up.log is not None:
            fields = {"length": n.a1, "prot": hex(n.a2), "flags": hex(n.a3), "offset": n.a5}
            self._up.log.call(self._call(n, process), "mmap", fields, result or None, entry.file)
        if result:
            self._answer(n, result)
        else:
            self._proceed(n.id)

    def _fallocate(self, n: Notification) -> None:
        process, entry = self._find(n, n.a0)
        if entry is None:
            self._proceed(n.id)
            return
        offset, length = _signed(n.a2), _signed(n.a3)
        result = 0
        try:
            entry.file.allocate(n.a1 & _U32, offset, length)
        except Errno as failure:
            result = -failure.number
        except OSError as failure:
            result = -(failure.errno or errno.EIO)
        call = self._call(n, process)
        self._up.conclude(call, "fallocate", {"mode": hex(n.a1 & _U32), "offset": offset, "length": length}, result, entry.file)

    def _guarded(self, n: Notification) -> None:
        """Reads, writes, fstat and truncation of an fd with a high number."""
        _, entry = self._find(n, n.a0)
        if entry is None or not entry.guarded:
            self._proceed(n.id)
            return
        if n.nr not in (calls.FSTAT, calls.NEWFSTATAT):
            self._answer(n, -errno.ESPIPE if n.nr in calls.AT_OFFSETS else -errno.EINVAL)
            return
        size = entry.file.bytes_ if isinstance(entry.file, GuestMemfdFile) else 0
        status = os.stat(f"/proc/{n.tid}/fd/{n.a0 & _U32}")
        fields = Fields(status.st_dev, status.st_ino, stat.S_IFREG | 0o600, 1, status.st_uid, status.st_gid, 0, size)
        self._up.peek(n.tid).write(n.a1 if n.nr == calls.FSTAT else n.a2, pack_stat(fields))
        self._answer(n, 0)

    # ---- the address space
    def _madvise(self, n: Notification) -> None:
        process = self._processes.known(n.tid)
        advice = n.a2 & _U32
        if process is None:
            self._proceed(n.id)
        elif advice == calls.MADV_COLLAPSE:
            entry = self._files.by_inode(*process.memory.ram.file_at(n.a0))
            if entry is not None and isinstance(entry.file, GuestMemfdFile):
                self._answer(n, -errno.EINVAL)
            else:
                self._proceed(n.id)
        elif process.memory.ram.discard(n.a0, n.a1) and advice == calls.MADV_FREE:
            self._answer(n, 0)  # the kernel frees private memory only; ours was private for the program
        else:
            self._proceed(n.id)

    def _mremap(self, n: Notification) -> None:
        process = self._processes.known(n.tid)
        if process is not None:
            process.memory.ram.forget()
        self._proceed(n.id)

    def _exec(self, n: Notification) -> None:
        self._up.new_image(n.tid)
        self._proceed(n.id)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
