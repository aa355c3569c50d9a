"""`KernelHost`: the seam's real side, system calls and nothing else.

`ioctl` is called for every guest exit, so it is as short as Python allows. Measured per call, with the kernel's
own work for the cheapest KVM ioctl included: fcntl.ioctl 720 ns (and it truncates addresses to 32 bits); a ctypes
prototype 510-560 ns; ctypes without argument types 290 ns, of which fetching errno costs 25 ns. Untyped ctypes
passes C ints: enough for an fd, for a 32-bit request number and for the argument 0 that KVM_RUN takes; arguments
that may be addresses go through the prototype. Both release the GIL, so vCPU threads run at the same time.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import sys
from collections.abc import Callable
from functools import partial

from kvmapi.abi.ioctls import KVM_RUN
from kvmapi.host import MAP_SHARED, PROT_READ_WRITE

_libc = ctypes.CDLL(None, use_errno=True)

# Indexing makes a new function object each time (an attribute would be shared), so the two can differ in types.
_ioctl_bare = _libc["ioctl"]
_ioctl_address = _libc["ioctl"]
_ioctl_address.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_fallocate = _libc["fallocate"]
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_get_errno = ctypes.get_errno

# Newer CPython repeats an ioctl that a signal interrupted (Modules/fcntlmodule.c on its main branch; 3.11 to 3.13 do not). A vCPU with
# immediate_exit set would then never come back.
_FCNTL_RETRIES = sys.version_info >= (3, 14)


class KernelHost:
    """The running kernel. It holds no state: fds are the process's own.

    >>> KernelHost().name
    'kernel'
    """

    name = "kernel"

    def open(self, path: str, flags: int) -> int:
        """open(2), close-on-exec. Raises OSError."""
        return os.open(path, flags | os.O_CLOEXEC)

    def close(self, fd: int) -> None:
        """close(2). Raises OSError."""
        os.close(fd)

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        """ioctl(2): the result, or -errno. The request's low 32 bits count, as in the kernel."""
        result: int = _ioctl_address(fd, request, arg) if arg else _ioctl_bare(fd, request, 0)
        return result if result >= 0 else -_get_errno()

    def runner(self, fd: int) -> Callable[[], int]:
        """A call that does KVM_RUN on `fd` and nothing else: 0, or -errno, or OSError.

        For a run loop's hot path. `fcntl.ioctl` without an argument passes 0 and skips the attempts to read the argument as a buffer, which
        is what makes it slow otherwise: 0.9 us on top of the exit, bare ctypes 1.2 us, `ioctl` above more.
        """
        if not _FCNTL_RETRIES:
            return partial(fcntl.ioctl, fd, KVM_RUN)

        def run() -> int:
            return 0 if _ioctl_bare(fd, KVM_RUN, 0) >= 0 else -_get_errno()

        return run

    def mmap(self, fd: int, length: int, prot: int = PROT_READ_WRITE, flags: int = MAP_SHARED, offset: int = 0) -> mmap.mmap:
        """mmap(2). Raises OSError.

        Python's mmap keeps a duplicate of `fd`, so a VM lives until its mappings are closed too. It also refuses a
        length beyond the end of a regular file (a guest_memfd is one), where the kernel would map and then raise
        SIGBUS; that refusal appears as EINVAL.
        """
        try:
            return mmap.mmap(fd, length, flags=flags, prot=prot, offset=offset)
        except (ValueError, OverflowError) as reason:
            raise OSError(errno.EINVAL, f"mmap of {length:#x} bytes at {offset:#x}: {reason}") from None

    def memfd_create(self, name: str, flags: int) -> int:
        """memfd_create(2). Raises OSError."""
        return os.memfd_create(name, flags)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2); unlike os.posix_fallocate it takes a mode. Raises OSError."""
        if _fallocate(fd, mode, offset, length) != 0:
            code = _get_errno()
            raise OSError(code, os.strerror(code))
