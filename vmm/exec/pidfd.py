"""pidfd_getfd(2), which Python does not have."""

from __future__ import annotations

import ctypes
import os

_SYS_PIDFD_GETFD = 438
_syscall = ctypes.CDLL(None, use_errno=True).syscall


def copy_fd(pidfd: int, number: int) -> int:
    """A copy, here, of the fd `number` of the process behind `pidfd`: the same open file, closed on exec. Raises OSError."""
    fd = int(_syscall(_SYS_PIDFD_GETFD, pidfd, ctypes.c_int(number), 0))
    if fd < 0:
        failure = ctypes.get_errno()
        raise OSError(failure, os.strerror(failure))
    return fd
