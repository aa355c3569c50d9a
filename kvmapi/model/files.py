"""What is behind an fd of the model: a file with ioctls, and its lifetime.

A file is released when its last fd is closed *and* no other file needs it: a VM outlives its fd while a vCPU or a
guest_memfd of it is open, as in the kernel, where each of those holds a reference.

VMs and vCPUs belong to the process (the mm) that made them: after a fork, the child gets EIO from each of their ioctls,
and closing its copies of the fds takes nothing from the parent. The same EIO is what a dead VM (one whose encryption
context was moved away) and its vCPUs answer.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakSet

from kvmapi.model.caller import Errno
from kvmapi.model.placeholder import StandIn, empty, sealed_empty

if TYPE_CHECKING:
    from kvmapi.model.caller import Caller

Handler = Callable[[int, "Caller"], int]


class _Refusing(dict[int, Handler]):
    """Whatever is asked: EIO."""

    def get(self, request: int, default: object = None) -> Handler:
        return lambda arg, caller: -errno.EIO


class File:
    """Base of the model's files. `handlers` maps a request number to a bound method (argument, caller) -> result."""

    kind = "file"
    belongs_to_mm = False

    def __init__(self) -> None:
        self._references = 1
        self._lost = False  # we are a forked child of the process that this file lives in
        self._reference_lock = threading.Lock()
        self.handlers: dict[int, Handler] = {}
        _alive.add(self)

    def lose(self) -> None:
        """In a child after fork: the file is the parent's."""
        self._lost = True
        self._reference_lock = threading.Lock()  # another thread of the parent may have held it
        if self.belongs_to_mm:
            self.refuse()

    @property
    def lost(self) -> bool:
        """Is this the copy that a forked child has of its parent's file?"""
        return self._lost

    def refuse(self) -> None:
        """From now on every ioctl, known or not, answers EIO: the caller is a stranger, or the VM is dead."""
        self.handlers = _Refusing()

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
            self._destroy_own()

    def _destroy_own(self) -> None:
        """Nobody holds it any more. A copy in a forked child is not ours to tear down."""
        if not self._lost:
            self.destroy()

    def destroy(self) -> None:
        """Give everything back. Called once."""

    def fd_closed(self) -> None:
        """The caller's fd is gone, and its hold on the file with it."""
        if not self._lost:
            self.last_fd_closed()
        self.release()

    def last_fd_closed(self) -> None:
        """The caller has no fd of this file any more (others may still hold it)."""

    def ioctl(self, request: int, arg: int, caller: Caller) -> int:
        """One ioctl of `caller`: the result, or -errno. Never raises."""
        lock, gone = self._reference_lock, False  # `enter` and `release`, in place: each ioctl pays for them
        with lock:
            if not self._references:  # another thread closed it just now
                return -errno.EBADF
            self._references += 1  # from here on it stays, as fdget keeps a file
        try:
            handler = self.handlers.get(request)
            if handler is None:
                handler = self.handlers.get(request & 0xFFFFFFFF)  # the kernel looks at the low 32 bits
                if handler is None:
                    return -self.unknown_errno()
            return handler(arg, caller)
        except Errno as failure:
            return -failure.number
        except OSError as failure:  # the process is out of fds (EMFILE) or memory, as the kernel would be
            return -(failure.errno or errno.EIO)
        except MemoryError:
            return -errno.ENOMEM
        finally:
            with lock:
                self._references -= 1
                gone = not self._references
            if gone:
                self._destroy_own()

    def unknown_errno(self) -> int:
        """The errno of a request number this kind of file does not have."""
        return 25  # ENOTTY

    def map(self, length: int, prot: int, flags: int, offset: int) -> mmap.mmap:
        """mmap of the file: ENODEV unless the kind can be mapped."""
        raise OSError(19, "No such device")

    def allocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate of the file."""
        raise OSError(19, "No such device")

    def placeholder(self) -> int:
        """A real fd that stands for the file in the caller's table. Raises OSError."""
        return empty(self.kind)

    def stand_in(self) -> StandIn:
        """The same for a caller in another process. Raises OSError."""
        return sealed_empty(self.kind)


class Foreign(File):
    """An open fd of the caller that is none of ours."""

    kind = "foreign"


_alive: WeakSet[File] = WeakSet()


def _forked() -> None:
    for file in list(_alive):
        file.lose()


os.register_at_fork(after_in_child=_forked)
