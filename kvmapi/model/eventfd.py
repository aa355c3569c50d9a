"""Eventfds of a caller, for IRQFD and IOEVENTFD: held through an fd of our own, told apart by the kernel's number.

Whoever signals one must never wait for its reader: a hostile caller leaves a counter full.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select

from kvmapi.model.caller import Errno

_ONE = (1).to_bytes(8, "little")


class EventFd:
    """An eventfd of the caller, held through an fd of our own that closes with this object. `key` is the same for all
    fds of one eventfd.
    """

    def __init__(self, fd: int, key: int) -> None:
        self.fd = fd
        self.key = key

    def __del__(self) -> None:
        os.close(self.fd)

    def signal(self) -> None:
        """Add one. A counter that is full stays full: a write to it could block."""
        room = select.poll()
        room.register(self.fd, select.POLLOUT)
        if room.poll(0):
            os.write(self.fd, _ONE)

    def consume(self) -> None:
        """Empty the counter, without blocking."""
        with contextlib.suppress(OSError):  # EAGAIN: someone else has emptied it
            os.preadv(self.fd, [bytearray(8)], -1, os.RWF_NOWAIT)


def own_eventfd(fd: int) -> EventFd:
    """This process's eventfd `fd`: Errno(EBADF) when nothing is open there, EINVAL for another kind of file."""
    try:
        copy = os.dup(fd)
    except OverflowError:
        raise Errno(errno.EBADF) from None
    except OSError as failure:
        raise Errno(failure.errno or errno.EBADF) from None
    return held_eventfd(copy)


def held_eventfd(copy: int) -> EventFd:
    """An EventFd of `copy`, an fd of ours that it takes over. Errno(EINVAL): another kind of file; `copy` is closed."""
    try:
        key = _eventfd_id(copy)
        if key is None:
            raise Errno(errno.EINVAL)
    except BaseException:
        os.close(copy)
        raise
    return EventFd(copy, key)


def _eventfd_id(fd: int) -> int | None:
    """The kernel's number for the eventfd behind `fd`; None where it is no eventfd."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("eventfd-id:"):
                return int(line.split()[1])
    return None
