"""KVM_PRE_FAULT_MEMORY: populate the second-level mappings of a range of guest-physical addresses.

The model has no second-level mappings to fill, so what is left of the ioctl is what user space can see: which pages
exist, that the caller's memory behind them is faulted in, and how far it came. Progress is written back even where it
fails; a call that did at least one page is a success. Source: kvm-sev-uapi facts §5, virt/kvm/kvm_main.c and
arch/x86/kvm/mmu/mmu.c (7.3).
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmapi.model.caller import PAGE, Caller, Errno
from kvmapi.model.mem.physical import Refused

if TYPE_CHECKING:
    from kvmapi.model.vcpu import VcpuFile

_RANGE = struct.Struct("<QQQ40s")
_AT_ONCE = 512  # pages between two chances for the vCPUs to run
_U64 = 1 << 64


def pre_fault(vcpu: VcpuFile, arg: int, caller: Caller) -> int:
    """The ioctl. EFAULT: bad pointer, or memory that a private or unmapped page cannot be served from; EINVAL: flags,
    alignment, nothing or a wrap; ENOENT: no slot there.
    """
    gpa, size, flags, rest = _RANGE.unpack(caller.memory.read(arg, _RANGE.size))
    done, failure = 0, 0
    if flags or gpa % PAGE or size % PAGE or not size or gpa + size >= _U64:
        failure = errno.EINVAL
    while done < size and not failure:
        pages = min((size - done) // PAGE, _AT_ONCE)
        with vcpu.vm.paused():
            good, failure = _fault_in(vcpu, (gpa + done) // PAGE, pages)
        done += good * PAGE
    caller.memory.write(arg, _RANGE.pack(gpa + done, size - done, flags, rest))
    if failure and not done:
        raise Errno(failure)
    return 0


def _fault_in(vcpu: VcpuFile, gfn: int, pages: int) -> tuple[int, int]:
    """(pages done, errno of the one that stopped it)."""
    physical = vcpu.vm.physical
    for at in range(pages):
        try:
            physical.populate(gfn + at)
        except Refused as why:
            if why.kind == "mmio":
                return at, errno.ENOENT
            if why.kind == "fault":
                vcpu.page.memory_fault(why.gpa, why.private)
            return at, errno.EFAULT
    return pages, 0
