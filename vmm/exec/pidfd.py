"""Which thread to ask about a process, and pidfd_getfd(2), which Python does not have.

A process lives on when its first thread has ended (pthread_exit in main); but memory, mappings and fds are found under
that thread's number no more. A thread may also have an fd table of its own (unshare(CLONE_FILES)).
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal

_SYS_PIDFD_GETFD = 438
_PIDFD_THREAD = os.O_EXCL  # Linux 6.9
_EXITING = 0x404  # PF_EXITING and PF_SIGNALED, in the flags that /proc/PID/stat shows
_syscall = ctypes.CDLL(None, use_errno=True).syscall


def living(tgid: int) -> int:
    """A thread of the process that has not ended: the first one where it can be. ProcessLookupError: there is none."""
    if _lives(tgid, tgid):
        return tgid
    try:
        threads = os.listdir(f"/proc/{tgid}/task")
    except OSError:
        threads = []
    for name in threads:
        if _lives(tgid, int(name)):
            return int(name)
    raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))


def _lives(tgid: int, tid: int) -> bool:
    try:
        with open(f"/proc/{tgid}/task/{tid}/stat", "rb", buffering=0) as stat:
            return stat.read(512).rpartition(b") ")[2][:1] not in b"ZX"
    except OSError:
        return False


def ending(tgid: int, tid: int) -> bool:
    """Has the thread ended, or been killed so that it is about to?"""
    try:
        with open(f"/proc/{tgid}/task/{tid}/stat", "rb", buffering=0) as stat:
            words = stat.read(512).rpartition(b") ")[2].split()
        with open(f"/proc/{tgid}/task/{tid}/status", "rb") as status:
            pending = next(int(line.split()[1], 16) for line in status if line.startswith(b"SigPnd:"))
    except OSError:
        return True
    return words[0] in b"ZX" or bool(int(words[6]) & _EXITING) or bool(pending >> signal.SIGKILL - 1 & 1)


def copy_fd(pidfd: int, number: int) -> int:
    """A copy, here, of the fd `number` of the process behind `pidfd`: the same open file, closed on exec. Raises OSError."""
    fd = int(_syscall(_SYS_PIDFD_GETFD, pidfd, ctypes.c_int(number), 0))
    if fd < 0:
        failure = ctypes.get_errno()
        raise OSError(failure, os.strerror(failure))
    return fd


def copy_fd_of(tgid: int, tid: int, number: int) -> int:
    """The same, of a thread of the process `tgid`; before Linux 6.9, of its first thread. Raises OSError."""
    try:
        pidfd = os.pidfd_open(tid, _PIDFD_THREAD)
    except OSError as failure:
        if failure.errno != errno.EINVAL:
            raise
        pidfd = os.pidfd_open(tgid)
    try:
        return copy_fd(pidfd, number)
    finally:
        os.close(pidfd)
