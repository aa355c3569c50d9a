"""VM ioctls for machinery that the model does not have: they are checked as the kernel checks them, and change nothing.

Source: 7.3, arch/x86/kvm/x86.c.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from kvmapi.model.caller import PAGE, Caller, Errno

_MIN_MMU_PAGES = 64  # KVM_MIN_ALLOC_MMU_PAGES
_MAX_TSS_ADDRESS = 0xFFFFFFFF - 3 * PAGE + 1


def set_tss_address(arg: int, caller: Caller) -> int:
    """KVM_SET_TSS_ADDR: three pages for real mode on Intel. EINVAL where they would pass 4 GiB."""
    if arg > _MAX_TSS_ADDRESS:
        raise Errno(errno.EINVAL)
    return 0


def set_identity_map(has_vcpus: Callable[[], bool], arg: int, caller: Caller) -> int:
    """KVM_SET_IDENTITY_MAP_ADDR: a page table for the same. EINVAL once there are vCPUs."""
    if has_vcpus():
        raise Errno(errno.EINVAL)
    caller.memory.read(arg, 8)
    return 0


def set_mmu_pages(arg: int, caller: Caller) -> int:
    """KVM_SET_NR_MMU_PAGES: a limit on shadow pages, of which the model has none. EINVAL below the kernel's minimum."""
    if arg < _MIN_MMU_PAGES:
        raise Errno(errno.EINVAL)
    return 0
