"""Calls by name: opening a device or a module parameter, and asking whether and what it is.

Every open and every question about a path comes to us, because the filter cannot look behind a pointer. So the way of
a path that is not ours is short: read it, look at its end, and let the kernel go on.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmapi.model.caller import PAGE, Errno
from kvmapi.model.host import device
from kvmapi.model.sev.device import SevDevice
from kvmapi.model.system import KvmDevice
from vmm.exec import filter as calls
from vmm.exec.caller import Call
from vmm.exec.fallthrough import is_node
from vmm.exec.launch import limits
from vmm.exec.notify import Notification
from vmm.exec.paths import Paths, absolute

if TYPE_CHECKING:
    from vmm.exec.supervisor import Supervisor

_PATH_MAX = 4096
_FIRST_READ = 96  # bytes of a path that are read at once: nearly every path is shorter
_BY_PATH_ALONE = frozenset((calls.OPEN, calls.ACCESS, calls.STAT, calls.LSTAT, calls.READLINK, *calls.XATTRS))  # others: a directory first
_FD_LINK = re.compile(rb"(?:/proc/(self|thread-self|[0-9]{1,9})(?:/task/[0-9]+)?|/dev)/fd/([0-9]{1,9})")
_HOW = struct.Struct("<QQQ")  # struct open_how: flags, mode, resolve
_FLAGS, _RESOLVE, _BENEATH = 0x7FFFC3, 0x3F, 8
_U32 = 0xFFFFFFFF
_OUT_OF_REACH = (
    "a program may not be looked into, so it sees this machine as it is: you may not read its file, or it has said PR_SET_DUMPABLE 0"
)
_AT_FDCWD = -100 & _U32


class Names:
    """Answers calls by name. `by_fd` answers the stat calls that name an fd instead."""

    def __init__(self, supervisor: Supervisor, paths: Paths, by_fd: Callable[[Notification], None]) -> None:
        self._up = supervisor
        self._files = supervisor.files
        self._listener = supervisor.listener
        self._proceed = supervisor.listener.proceed
        self._paths = paths
        self._by_fd = by_fd

    def _answer(self, notification: Notification, result: int) -> None:
        self._listener.answer(notification.id, result)

    def _path(self, notification: Notification, address: int) -> bytes:
        """The string at `address` of the caller; empty where there is none."""
        if not address:
            return b""
        memory = self._up.peek(notification.tid)
        size = min(_FIRST_READ, PAGE - address % PAGE)
        found = bytearray()
        while len(found) < _PATH_MAX:
            try:
                found += memory.read(address + len(found), size)
            except Errno:
                if ctypes.get_errno() == errno.EPERM:
                    self._up.say_once(_OUT_OF_REACH)
                return b""  # the kernel will find the same
            end = found.find(b"\0")
            if end >= 0:
                return bytes(found[:end])
            size = PAGE - (address + len(found)) % PAGE
        return b""

    def _asked_path(self, n: Notification) -> bytes:
        """The path argument of a call by name."""
        return self._path(n, n.a0 if n.nr in _BY_PATH_ALONE else n.a1)

    def _named(self, n: Notification, path: bytes) -> str | None:
        """The absolute path that a call by name is about, if it is one of ours."""
        if not path.endswith((b"kvm", b"sev")) and b"module/kvm" not in path:
            return None
        name = absolute(path, n.tid, _AT_FDCWD if n.nr in _BY_PATH_ALONE else n.a0 & _U32)
        return name if name is not None and self._paths.concerns(name) else None

    def open(self, n: Notification) -> None:
        path = self._asked_path(n)
        name = self._named(n, path)
        if n.tid in self._up.fresh:
            self._up.image_starts(n)
        if name is None and b"/fd/" in path and (link := self._link(n.tid, path)) is not None:
            file = self._files.by_inode(link.st_dev, link.st_ino)
            if file is None:
                name = "/dev/kvm" if is_node(link) else None  # the machine's own, opened with O_PATH
            elif isinstance(file.file, KvmDevice | SevDevice):
                name = "/dev/kvm" if isinstance(file.file, KvmDevice) else "/dev/sev"
            else:
                self._answer(n, -errno.ENXIO)  # what the kernel says of a file that nobody opened by name
                return
        if name is None:
            self._proceed(n.id)
            return
        flags = self._how(n, path) if n.nr == calls.OPENAT2 else n.a1 if n.nr == calls.OPEN else n.a2
        call = Call(self._listener, self._files, self._up.processes.sure(n.tid), n.id, n.tid, n.ip)
        call.close_on_exec, call.access = bool(flags & os.O_CLOEXEC), flags & (os.O_ACCMODE | os.O_NONBLOCK)
        if self._up.fallthrough is not None and self._up.fallthrough.opens(name):
            if self._up.log is not None:
                self._up.log.call(call, "open", {"path": name, "flags": hex(flags)}, None)
            self._proceed(n.id)
            return
        result = self._opened(name, flags, call)
        if result is None:
            self._proceed(n.id)
        else:
            self._up.conclude(call, "open", {"path": name, "flags": hex(flags)}, result)

    def _how(self, n: Notification, path: bytes) -> int:
        """The flags of an openat2(2) that is made as it must be. Raises Errno."""
        if n.a3 < _HOW.size:
            raise Errno(errno.EINVAL)
        flags, mode, resolve = _HOW.unpack(self._up.peek(n.tid).read(n.a2, _HOW.size))
        creates = flags & (os.O_CREAT | os.O_TMPFILE & ~os.O_DIRECTORY)
        if flags & ~_FLAGS or resolve & ~_RESOLVE or mode & ~0o7777 or (mode and not creates):
            raise Errno(errno.EINVAL)
        if resolve & _BENEATH and path.startswith(b"/"):
            raise Errno(errno.EXDEV)
        return int(flags)

    def _opened(self, name: str, flags: int, call: Call) -> int | None:
        """The result of opening a name of ours; None: it is the kernel's to answer."""
        try:
            content = self._paths.parameter(name)
            if content is not None:
                if flags & os.O_ACCMODE != os.O_RDONLY:
                    return -errno.EACCES
                return self._give_file(call, content)
            if not self._paths.is_device(name):
                return None if self._paths.is_folder(name) else -errno.ENOENT
            if flags & os.O_DIRECTORY:
                return -errno.ENOTDIR
            if flags & os.O_CREAT and flags & os.O_EXCL:
                return -errno.EEXIST
            if flags & os.O_PATH:  # no such fd can be given to another process: the machine's own will do, if it is one
                return None if _has_node(call.thread, name) else -errno.ENXIO
            self._files.take_news()
            if small := limits():
                self._up.say_once(f"ulimit {small} binds the model, too: VMs, vCPUs or guest memory may be refused for want of room")
            return call.install(device(self._up.platform, name, flags))
        except Errno as failure:
            return -failure.number

    def _give_file(self, call: Call, content: bytes) -> int:
        fd = os.memfd_create("sevmm:parameter", os.MFD_CLOEXEC)
        try:
            os.write(fd, content)
            return self._give(call, os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
        finally:
            os.close(fd)

    def _give(self, call: Call, fd: int) -> int:
        """Hand over an fd that is nothing but what it is."""
        try:
            return self._listener.add_fd(call.id, fd, close_on_exec=call.close_on_exec)
        except OSError as failure:
            return -(failure.errno or errno.EMFILE)
        finally:
            os.close(fd)

    def _link(self, tid: int, path: bytes) -> os.stat_result | None:
        """What an open by the name of an open fd (/proc/self/fd/7, /dev/fd/7) would open."""
        found = _FD_LINK.fullmatch(path)
        if found is None:
            return None
        whose = found[1] or b""
        try:
            return os.stat(f"/proc/{int(whose) if whose.isdigit() else tid}/fd/{int(found[2])}")
        except OSError:
            return None

    def ask(self, n: Notification) -> None:
        name = self._named(n, self._asked_path(n))
        if name is not None:
            self._answer(n, self._asked(n, name))
        elif n.nr == calls.NEWFSTATAT and n.a3 & calls.AT_EMPTY_PATH and n.a0 & _U32 != _AT_FDCWD:
            self._by_fd(n)
        else:
            self._proceed(n.id)

    def _asked(self, n: Notification, name: str) -> int:
        mode = self._paths.mode(name)
        if mode is None:
            return -errno.ENOENT
        if n.nr in (calls.ACCESS, calls.FACCESSAT, calls.FACCESSAT2):
            wanted = n.a1 if n.nr == calls.ACCESS else n.a2
            return -errno.EACCES if wanted & 7 & ~(mode >> 6) else 0
        if n.nr in calls.XATTRS:
            return -errno.ENODATA if n.nr in (calls.GETXATTR, calls.LGETXATTR) else 0  # none
        memory = self._up.peek(n.tid)
        if n.nr in (calls.READLINK, calls.READLINKAT):
            return -errno.EINVAL  # no link
        if n.nr == calls.STATX:
            memory.write(n.a4, self._paths.statx(name))
        else:
            memory.write(n.a1 if n.nr in (calls.STAT, calls.LSTAT) else n.a2, self._paths.stat(name))
        return 0

    def open_32(self, n: Notification) -> None:
        """32-bit code: it may open what it likes but the devices, whose structures the model has for 64 bits."""
        path = self._path(n, n.a0 if n.nr == calls.I386_OPEN else n.a1)
        name = absolute(path, n.tid, _AT_FDCWD if n.nr == calls.I386_OPEN else n.a0 & _U32)
        if name is None or not self._paths.concerns(name):
            self._proceed(n.id)
            return
        self._up.say_once(f"32-bit code of the program asked for {name}: only 64-bit programs are served (ENODEV)")
        self._answer(n, -errno.ENODEV)


def _has_node(tid: int, name: str) -> bool:
    """Is the machine's own /dev/kvm where this thread would find the name?"""
    try:
        return is_node(os.stat(f"/proc/{tid}/root{name}"))
    except OSError:
        return False
