"""How an ioctl request number is made: direction, argument size, a letter for the driver, and a sequence number.

    bits 31:30 direction (seen from user space)   29:16 size of the argument struct   15:8 driver   7:0 number

This is asm-generic/ioctl.h, which x86 uses unchanged. The size is part of the number: two ioctls that share a
sequence number but not a struct (KVM_GET_PIT2 and KVM_GET_VCPU_EVENTS, both 0x9f) are different requests.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

IOC_NONE = 0
IOC_WRITE = 1  # user space writes, the kernel reads
IOC_READ = 2

_SIZE_SHIFT = 16
_DIR_SHIFT = 30
_TYPE_SHIFT = 8
_SIZE_MASK = 0x3FFF

Sized = type[ctypes.Structure] | type[ctypes.Union] | type[ctypes.c_uint64] | type[ctypes.c_ulong]


def _IOC(direction: int, driver: int, number: int, size: int) -> int:
    return direction << _DIR_SHIFT | size << _SIZE_SHIFT | driver << _TYPE_SHIFT | number


def _IO(driver: int, number: int) -> int:
    """A request whose argument is nothing or a plain value."""
    return _IOC(IOC_NONE, driver, number, 0)


def _IOR(driver: int, number: int, struct: Sized) -> int:
    """A request that fills `struct` (the kernel does not enforce this; several KVM ioctls are declared wrongly)."""
    return _IOC(IOC_READ, driver, number, ctypes.sizeof(struct))


def _IOW(driver: int, number: int, struct: Sized) -> int:
    """A request that reads `struct`."""
    return _IOC(IOC_WRITE, driver, number, ctypes.sizeof(struct))


def _IOWR(driver: int, number: int, struct: Sized) -> int:
    """A request that reads and fills `struct`."""
    return _IOC(IOC_READ | IOC_WRITE, driver, number, ctypes.sizeof(struct))


class Request(NamedTuple):
    """The four fields of a request number; `driver` is 0xAE for KVM and 0x53 ('S') for /dev/sev."""

    direction: int
    size: int
    driver: int
    number: int

    def __str__(self) -> str:
        words = {0: "_IO", IOC_READ: "_IOR", IOC_WRITE: "_IOW", IOC_READ | IOC_WRITE: "_IOWR"}[self.direction]
        size = f", {self.size} bytes" if self.size else ""
        return f"{words}({self.driver:#x}, {self.number:#x}{size})"


def decode_request(request: int) -> Request:
    """Take a request number apart.

    >>> str(decode_request(0x4020AE46))
    '_IOW(0xae, 0x46, 32 bytes)'
    """
    request &= 0xFFFF_FFFF
    return Request(
        direction=request >> _DIR_SHIFT,
        size=request >> _SIZE_SHIFT & _SIZE_MASK,
        driver=request >> _TYPE_SHIFT & 0xFF,
        number=request & 0xFF,
    )
