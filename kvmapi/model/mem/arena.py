"""Secret memory, and the arena made of it: where plaintext of encrypted pages may stand, and only while a vCPU runs.

The CPU engine needs plaintext at some host address. It gets frames in this arena: secret memory (memfd_secret) where
the kernel has it, so that not even ptrace, /proc/PID/mem or a core dump can read it, and inaccessible (PROT_NONE)
whenever no vCPU is inside KVM_RUN. On kernels without memfd_secret an ordinary anonymous mapping outside core dumps
takes its place; `secret` says which. The firmware keeps its keys in the same kind of memory (sev/vault.py).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from weakref import WeakSet

from kvmapi.model.mem.cipher import ROOM, Workspace

PAGE = 4096
FRAMES = 512
SYS_MEMFD_SECRET = 447  # x86-64 and the generic table
_MADV_DONTFORK, _MADV_DONTDUMP = 10, 16
_MAP_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_mprotect = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)(("mprotect", _libc))
_mmap = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long, use_errno=True
)(("mmap", _libc))
_munmap = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)(("munmap", _libc))
_madvise = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)(("madvise", _libc))


def _secret_mapping(size: int) -> int | None:
    """The address of `size` bytes of secret memory, or None. No fd of it stays open: one could be taken from us and mapped."""
    fd = _libc.syscall(SYS_MEMFD_SECRET, os.O_CLOEXEC)
    if fd < 0:
        return None
    try:
        os.ftruncate(fd, size)
        # Pages are locked: RLIMIT_MEMLOCK may refuse the mapping.
        address: int | None = _mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        return None if address == _FAILED else address
    except OSError:
        return None
    finally:
        os.close(fd)


_regions: WeakSet[SecretRegion] = WeakSet()


def _forked() -> None:
    for region in list(_regions):
        region.forked()


os.register_at_fork(after_in_child=_forked)


def _ordinary_mapping(size: int) -> int:
    """The address of `size` bytes that stay out of core dumps. MemoryError when there are none."""
    address: int | None = _mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if address is None or address == _FAILED:
        raise MemoryError(f"{size} bytes for keys and plaintext of the model's guests")
    _madvise(address, size, _MADV_DONTDUMP)
    return address


class SecretRegion:
    """`size` bytes (whole pages) of zeroed secret memory with a door: outside an open door even our own process faults on them.
    It lives as long as anybody has a view of it; the kernel clears it then. Not thread-safe: its owner has a lock.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        address = _secret_mapping(size)
        self.secret = address is not None
        self.address = _ordinary_mapping(size) if address is None else address
        whole = (ctypes.c_ubyte * size).from_address(self.address)
        weakref.finalize(whole, _munmap, self.address, size).atexit = False
        self.view = memoryview(whole).cast("B")
        _madvise(self.address, size, _MADV_DONTFORK)
        self._open = True
        self.close_door()
        _regions.add(self)

    def forked(self) -> None:
        """In a child: the memory is not shared with it. Zeroes of its own stand there, so that whoever has a view can go."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        _mmap(self.address, self.size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        self._open = True
        self.close_door()

    def open_door(self) -> None:
        """Make the memory accessible."""
        if not self._open:
            _mprotect(self.address, self.size, mmap.PROT_READ | mmap.PROT_WRITE)
            self._open = True

    def close_door(self) -> None:
        """Make the memory inaccessible."""
        if self._open:
            _mprotect(self.address, self.size, 0)
            self._open = False


class Arena(SecretRegion):
    """FRAMES page frames, and behind them room for a cipher to work in. The door opens when a vCPU enters, and closes when
    the last one has left.
    """

    def __init__(self) -> None:
        super().__init__(FRAMES * PAGE + -(-ROOM // PAGE) * PAGE)
        self.work = Workspace(self.view[FRAMES * PAGE : FRAMES * PAGE + ROOM])

    def destroy(self) -> None:
        """Let go of it; its pages go, cleared by the kernel, with the last view."""
        self.close_door()
        self.view = memoryview(b"")
        self.work.hidden = memoryview(b"")
