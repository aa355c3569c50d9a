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
from dataclasses import dataclass

from kvmapi.model.mem.arena import SYS_MEMFD_SECRET

_F_ADD_SEALS = 1033
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW, _SEAL_WRITE = 0x1, 0x2, 0x4, 0x8
_SEALS = _SEAL_SEAL | _SEAL_SHRINK | _SEAL_GROW | _SEAL_WRITE
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


@dataclass(frozen=True)
class StandIn:
    """The file another process gets for one of the model's: `fd` is ours to open anew (through /proc/self/fd) and to close;
    `access` is O_RDWR, O_RDONLY or O_WRONLY. `guarded`: reads, writes and fstat of it must be answered by us.
    """

    fd: int
    access: int = os.O_RDWR
    guarded: bool = False


def sealed_empty(kind: str) -> StandIn:
    """A file without content, which cannot be given any."""
    fd = os.memfd_create(f"sevmm:{kind}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
    return StandIn(fd)


def sealed_closed(kind: str, size: int) -> StandIn:
    """A file of `size` bytes that can neither be read nor written nor resized, for another process: memfd_secret's cannot be
    opened anew.
    """
    fd = _sized(os.memfd_create(f"sevmm:{kind}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), size)
    fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
    return StandIn(fd, os.O_WRONLY, guarded=True)


def keeps_its_size(fd: int) -> None:
    """Nobody who gets the memfd can cut it off under our mapping: that would be SIGBUS for us. Raises OSError."""
    fcntl.fcntl(fd, _F_ADD_SEALS, _SEAL_SEAL | _SEAL_SHRINK | _SEAL_GROW)


def _sized(fd: int, size: int) -> int:
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd
