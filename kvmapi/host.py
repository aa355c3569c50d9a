"""The seam: the handful of system calls through which everything above reaches KVM, real or modelled.

An fd is an integer and an argument is an integer (a value, or an address in the caller's memory), because that is
what a system call takes; a host never gets a Python object from its caller. `ioctl` is the hot path, so it returns
the kernel's answer as a number and leaves words to the layer above; the other calls behave like Python's `os`.
"""

from __future__ import annotations

import mmap
from typing import Protocol, runtime_checkable

MAP_SHARED = mmap.MAP_SHARED
PROT_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


@runtime_checkable
class Host(Protocol):
    """One side of the seam. Implementations: `KernelHost`, the model's, the recorder's and the replayer's."""

    @property
    def name(self) -> str:
        """ "kernel" or "model"; wrappers have the name of what they wrap."""

    def open(self, path: str, flags: int) -> int:
        """open(2). Returns an fd; raises OSError."""

    def close(self, fd: int) -> None:
        """close(2) of an fd that this host made. Raises OSError."""

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        """ioctl(2): the result, >= 0, or -errno. Never raises, makes no copies, and lets other threads run."""

    def mmap(self, fd: int, length: int, prot: int = PROT_READ_WRITE, flags: int = MAP_SHARED, offset: int = 0) -> mmap.mmap:
        """mmap(2), `length` and `offset` in bytes. Raises OSError."""

    def memfd_create(self, name: str, flags: int) -> int:
        """memfd_create(2). Returns an fd; raises OSError."""

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2), `offset` and `length` in bytes. Raises OSError."""
