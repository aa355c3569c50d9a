"""Seccomp user notification: the listener's side of its interface.

A program runs under a filter (filter.py) that hands some of its system calls to us. Each arrives as a notification and
waits until it is answered: with a result, with an errno, with "go on, kernel", or with a new fd in the caller's table.

The filter is installed with WAIT_KILLABLE_RECV: once we have received a notification only a fatal signal ends the wait,
so a call is never made twice and never lost. Layouts and rules: Documentation/userspace-api/seccomp_filter.rst and
include/uapi/linux/seccomp.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import struct
from typing import NamedTuple

SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_NEW_LISTENER, SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV = 8, 32
_RECV, _SEND, _ID_VALID, _ADDFD, _SET_FLAGS = 0xC0502100, 0xC0182101, 0x40082102, 0x40182103, 0x40082104
_SYNC_WAKE_UP = 1  # SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP
_ZEROES = bytes(80)
_CONTINUE = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
_ADDFD_SETFD = 1
_REQUEST = struct.Struct("<QII iI Q 6Q")  # id, pid, flags | nr, arch, instruction pointer, arguments
_RESPONSE = struct.Struct("<QqiI")  # id, value, error, flags
_NEW_FD = struct.Struct("<QIIII")  # id, flags, source fd, new fd, new fd's flags
_SYS_SECCOMP = 317
_PR_SET_NO_NEW_PRIVS = 38

_libc = ctypes.CDLL(None, use_errno=True)


class Notification(NamedTuple):
    """One system call that waits. `ip` is the address behind its instruction."""

    id: int
    tid: int
    flags: int
    nr: int
    arch: int
    ip: int
    a0: int
    a1: int
    a2: int
    a3: int
    a4: int
    a5: int


_make = tuple.__new__  # NamedTuple's own ways take twice as long


class Listener:
    """The fd that a filter's notifications come from. Any number of threads may receive."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        with contextlib.suppress(OSError):  # Linux 6.6; without it, a call may be answered by a CPU that must wake up first
            fcntl.ioctl(fd, _SET_FLAGS, _SYNC_WAKE_UP)

    def receive(self, buffer: bytearray) -> Notification:
        """The next system call; waits. `buffer`: 80 bytes of the calling thread's. OSError: ENOENT when the caller was killed
        meanwhile or no task has the filter any more (`deserted` tells which).
        """
        buffer[:] = _ZEROES
        fcntl.ioctl(self.fd, _RECV, buffer, True)
        return _make(Notification, _REQUEST.unpack(buffer))

    def deserted(self) -> bool:
        """Has the last task with the filter ended?"""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return any(events & select.POLLHUP for _, events in poll.poll(0))

    def answer(self, notification: int, result: int) -> bool:
        """End the call with `result`, or with errno -`result`. False: the caller is gone."""
        return self._send(_RESPONSE.pack(notification, 0, result, 0) if result < 0 else _RESPONSE.pack(notification, result, 0, 0))

    def proceed(self, notification: int) -> bool:
        """Let the kernel make the call as if we were not there. False: the caller is gone."""
        return self._send(_RESPONSE.pack(notification, 0, 0, _CONTINUE))

    def _send(self, response: bytes) -> bool:
        try:
            fcntl.ioctl(self.fd, _SEND, response)
        except OSError:  # ENOENT: killed; EINPROGRESS cannot be, each is answered once
            return False
        return True

    def add_fd(self, notification: int, fd: int, *, close_on_exec: bool, at: int | None = None) -> int:
        """Put a copy of our `fd` into the caller's table, at the lowest free number or `at`; the call goes on waiting. The
        number. OSError: EMFILE, or ENOENT when the caller is gone.
        """
        flags = 0 if at is None else _ADDFD_SETFD
        packed = bytearray(_NEW_FD.pack(notification, flags, fd, at or 0, os.O_CLOEXEC if close_on_exec else 0))
        number: int = fcntl.ioctl(self.fd, _ADDFD, packed, True)
        return number

    def valid(self, notification: int) -> bool:
        """Does the caller still wait? Then its tid is still its own."""
        with contextlib.suppress(OSError):
            fcntl.ioctl(self.fd, _ID_VALID, notification.to_bytes(8, "little"))
            return True
        return False


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(program: bytes) -> int:
    """Put this thread, and all it starts, under the BPF `program`; the listener's fd. OSError: EBUSY when somebody listens to
    this process already, EINVAL where the kernel lacks a part (user notification: 5.0, WAIT_KILLABLE_RECV: 5.19),
    ENOSYS or EPERM where seccomp(2) itself is forbidden.
    """
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    code = ctypes.create_string_buffer(program, len(program))
    holder = _Program(len(program) // 8, ctypes.addressof(code))
    flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
    fd = int(_libc.syscall(_SYS_SECCOMP, SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(holder)))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, errno.errorcode.get(number, "") or "seccomp")
    return fd
