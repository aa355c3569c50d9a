"""The arena: where plaintext of encrypted pages may stand, and only while a vCPU runs.

The CPU engine needs plaintext at some host address. It gets frames in this arena: secret memory (memfd_secret) where
the kernel has it, so that not even ptrace, /proc/PID/mem or a core dump can read it, and inaccessible (PROT_NONE)
whenever no vCPU is inside KVM_RUN. On kernels without memfd_secret an ordinary anonymous mapping outside core dumps
takes its place; `secret` says which.
"""

from __future__ import annotations

import ctypes
import mmap
import os

PAGE = 4096
FRAMES = 512
SYS_MEMFD_SECRET = 447  # x86-64 and the generic table
_MADV_DONTDUMP = 16
_libc = ctypes.CDLL(None, use_errno=True)
_mprotect = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)(("mprotect", _libc))


def _secret_mapping(size: int) -> mmap.mmap | None:
    fd = _libc.syscall(SYS_MEMFD_SECRET, os.O_CLOEXEC)
    if fd < 0:
        return None
    try:
        os.ftruncate(fd, size)
        # Pages are locked: RLIMIT_MEMLOCK may refuse the mapping.
        return mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)


class Arena:
    """FRAMES page frames, openable."""

    def __init__(self) -> None:
        self.size = (FRAMES + 1) * PAGE  # one page of slack behind the last frame, see `room`
        mapping = _secret_mapping(self.size)
        self.secret = mapping is not None
        if mapping is None:
            mapping = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            mapping.madvise(_MADV_DONTDUMP)
        self._mapping = mapping
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self.view = memoryview(mapping)
        self._open = True
        self.close_door()

    def room(self, index: int) -> memoryview:
        """Frame `index` and the 15 bytes behind it, for a cipher that wants room for a block more than it writes."""
        return self.view[index * PAGE : (index + 1) * PAGE + 15]

    def open_door(self) -> None:
        """Make the frames accessible: a vCPU enters."""
        if not self._open:
            _mprotect(self.address, self.size, mmap.PROT_READ | mmap.PROT_WRITE)
            self._open = True

    def close_door(self) -> None:
        """Make the frames inaccessible: the last vCPU left."""
        if self._open:
            _mprotect(self.address, self.size, 0)
            self._open = False

    def destroy(self) -> None:
        """Wipe and unmap."""
        self.open_door()
        self.view[:] = bytes(self.size)
        self.view.release()
        del self._mapping  # the mapping goes with its last reference
