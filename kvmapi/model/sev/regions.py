"""Pinned memory: what KVM charges for it, and KVM_MEMORY_ENCRYPT_REG_REGION and UNREG_REGION.

Memory under encryption must not move, so KVM pins it: registered regions until they are unregistered, the ranges of a
command while it lasts. All of it counts against RLIMIT_MEMLOCK, per VM. The model pins nothing, as its ciphertext does
not care where the page really is; it counts, and it refuses what could not be pinned.

Checks in order: EINVAL for an empty or wrapping range, for more pages than an int counts, and for more than the machine
has; ENOMEM beyond the limit of a caller without CAP_IPC_LOCK; ENOMEM for pages that are not there, or that a command
would write to and must not. A region may be read-only and of any alignment; nothing is deduplicated.
"""

from __future__ import annotations

import errno
import os
import struct
from collections import Counter
from typing import TYPE_CHECKING

from kvmapi.model.caller import PAGE, USER_TOP, Caller, Errno

if TYPE_CHECKING:
    from kvmapi.model.sev.context import SevContext

_REGION = struct.Struct("<QQ")
_INT_MAX = (1 << 31) - 1
_U64 = 1 << 64


class Pins:
    """The pages one VM has pinned, and the regions they belong to."""

    def __init__(self) -> None:
        self.pages = 0
        self._regions: Counter[tuple[int, int]] = Counter()

    def check(self, pages: int, caller: Caller) -> None:
        """May so many more be pinned? EINVAL or ENOMEM (sev_check_pin_count)."""
        total = self.pages + pages
        if total > os.sysconf("SC_PHYS_PAGES"):
            raise Errno(errno.EINVAL)
        limit = caller.memlock_limit()
        if limit is not None and total > limit // PAGE:
            raise Errno(errno.ENOMEM)

    def check_range(self, address: int, size: int, caller: Caller, *, write: bool = True, whole: bool = True) -> int:
        """Pin the caller's [address, address+size) for the time of a command: how many pages that is (sev_pin_memory).

        `whole`: the command is about to use every page of it.
        """
        if not size or address + size >= _U64:
            raise Errno(errno.EINVAL)
        pages = (address + size - 1) // PAGE - address // PAGE + 1
        if pages > _INT_MAX:
            raise Errno(errno.EINVAL)
        self.check(pages, caller)
        if address + size > USER_TOP or not caller.memory.pinnable(address, size, write, whole):
            raise Errno(errno.ENOMEM)
        return pages

    def check_page(self, address: int, caller: Caller, *, write: bool, pinned: int = 0) -> None:
        """Pin the page of `address` for the time of a command that holds `pinned` others (sev_pin_page)."""
        self.check(pinned + 1, caller)
        if address >= USER_TOP or not caller.memory.pinnable(address & -PAGE, PAGE, write):
            raise Errno(errno.ENOMEM)

    def register(self, address: int, size: int, caller: Caller) -> None:
        """Pin a region until it is unregistered."""
        self.pages += self.check_range(address, size, caller, write=False, whole=False)
        self._regions[address, size] += 1

    def registered(self, address: int, size: int) -> bool:
        """Is there a registration of exactly this region?"""
        return (address, size) in self._regions

    def unregister(self, address: int, size: int) -> None:
        """Undo one registration."""
        self._regions[address, size] -= 1
        if not self._regions[address, size]:
            del self._regions[address, size]
        self.pages -= (address + size - 1) // PAGE - address // PAGE + 1


def register(context: SevContext, arg: int, caller: Caller) -> int:
    """KVM_MEMORY_ENCRYPT_REG_REGION: EFAULT, ENOTTY on a VM that is no guest, EINVAL on a mirror, then as any pin."""
    address, size = _REGION.unpack(caller.memory.read(arg, _REGION.size))
    with context.vm.mutex:
        context.refuse_if_dead()
        _require_guest(context)
        if context.owner is not None:
            raise Errno(errno.EINVAL)
        context.pins.register(address, size, caller)
    return 0


def unregister(context: SevContext, arg: int, caller: Caller) -> int:
    """KVM_MEMORY_ENCRYPT_UNREG_REGION: EFAULT, EINVAL on a mirror, ENOTTY, EINVAL unless a registration is the same."""
    address, size = _REGION.unpack(caller.memory.read(arg, _REGION.size))
    if context.owner is not None:
        raise Errno(errno.EINVAL)
    with context.vm.mutex:
        context.refuse_if_dead()
        _require_guest(context)
        if not context.pins.registered(address, size):
            raise Errno(errno.EINVAL)
        with context.guest_memory():  # as the kernel writes caches back: the caller may give the pages away
            context.pins.unregister(address, size)
    return 0


def _require_guest(context: SevContext) -> None:
    if not context.active:
        raise Errno(errno.ENOTTY)
