"""What is behind an fd of the model: a file with ioctls, and its lifetime.

A file is released when its last fd is closed *and* no other file needs it: a VM outlives its fd while a vCPU or a
guest_memfd of it is open, as in the kernel, where each of those holds a reference.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmapi.model.caller import Caller

Handler = Callable[[int, "Caller"], int]


class File:
    """Base of the model's files. `handlers` maps a request number to a bound method (argument, caller) -> result."""

    kind = "file"

    def __init__(self) -> None:
        self._references = 1
        self._reference_lock = threading.Lock()
        self.handlers: dict[int, Handler] = {}

    def acquire(self) -> None:
        """One more holder."""
        with self._reference_lock:
            self._references += 1

    def enter(self) -> bool:
        """A system call begins on it: hold it until `release`, unless it is gone already (False)."""
        with self._reference_lock:
            if not self._references:
                return False
            self._references += 1
            return True

    def release(self) -> None:
        """One holder less; the last one out tears down."""
        with self._reference_lock:
            self._references -= 1
            last = self._references == 0
        if last:
            self.destroy()

    def destroy(self) -> None:
        """Give everything back. Called once."""

    def last_fd_closed(self) -> None:
        """The caller has no fd of this file any more (others may still hold it)."""

    def unknown_errno(self) -> int:
        """The errno of a request number this kind of file does not have."""
        return 25  # ENOTTY

    def map(self, length: int, prot: int, flags: int, offset: int) -> mmap.mmap:
        """mmap of the file: ENODEV unless the kind can be mapped."""
        raise OSError(19, "No such device")

    def allocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate of the file."""
        raise OSError(19, "No such device")

    def size(self) -> int:
        """st_size."""
        return 0


class Foreign(File):
    """An open fd of the caller that is none of ours."""

    kind = "foreign"
