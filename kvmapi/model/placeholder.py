"""The real fds that stand for the model's files.

A number that the caller holds must be a real fd, or it would collide with others. Most placeholders are empty memfds.
A guest_memfd's is more: its size and inode are what fstat shows, and no read, write or truncation of it may succeed.
An fd of memfd_secret answers all of those exactly as a guest_memfd does (EINVAL, ESPIPE for pread and pwrite); nothing
is ever mapped through it, so it costs no locked memory. Where the kernel lacks memfd_secret, a sealed memfd open for
writing only takes its place: reading is EBADF there, writing and truncating EPERM.
"""

from __future__ import annotations

import ctypes
import fcntl
import os

from kvmapi.model.mem.arena import SYS_MEMFD_SECRET

_F_ADD_SEALS = 1033
_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # SEAL, SHRINK, GROW, WRITE
_libc = ctypes.CDLL(None, use_errno=True)


def empty(kind: str) -> int:
    """An fd for a file without content. Raises OSError (EMFILE, ...)."""
    return os.memfd_create(f"sevmm:{kind}", os.MFD_CLOEXEC)


def closed_file(kind: str, size: int) -> int:
    """An fd whose fstat shows `size` bytes and an inode of its own, and that gives and takes none of them. Raises
    OSError.
    """
    fd = int(_libc.syscall(SYS_MEMFD_SECRET, os.O_CLOEXEC))
    if fd >= 0:
        return _sized(fd, size)
    fd = _sized(os.memfd_create(f"sevmm:{kind}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), size)
    try:
        write_only = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)
    fcntl.fcntl(write_only, _F_ADD_SEALS, _SEALS)
    return write_only


def _sized(fd: int, size: int) -> int:
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd
