"""KVM_CAP_SYNC_REGS: registers that travel in kvm_run, instead of by ioctls around KVM_RUN.

What user space marks in kvm_dirty_regs is taken from there at the entry; what it asks for in kvm_valid_regs stands there
after every exit. A VM whose vCPUs have protected state offers none of it, and a vCPU that was launched with an encrypted VMSA
gives nothing back. Layout facts: struct kvm_run and struct kvm_sync_regs; sync_regs and store_regs in
arch/x86/kvm/x86.c.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.caller import Errno
from kvmapi.model.cpu import events, sregs
from kvmapi.model.platform import has_protected_state
from kvmapi.model.vcpu_state import REGS

if TYPE_CHECKING:
    from kvmapi.model.vcpu import VcpuFile

_SYNC = struct.Struct("<QQ")
SYNC_AT, _REGS_AT = 288, 304  # kvm_valid_regs, kvm_dirty_regs; then struct kvm_sync_regs
_SREGS_AT = _REGS_AT + REGS.size
_EVENTS_AT = _SREGS_AT + sregs.SIZE
_ALL = kvm.KVM_SYNC_X86_REGS | kvm.KVM_SYNC_X86_SREGS | kvm.KVM_SYNC_X86_EVENTS


def take(vcpu: VcpuFile, valid: int, dirty: int) -> None:
    """Take what is marked dirty. EINVAL for bits that the VM does not offer, and for state that KVM refuses."""
    if (valid | dirty) & ~(0 if has_protected_state(vcpu.vm.type) else _ALL):
        raise Errno(errno.EINVAL)
    if dirty:
        _take(vcpu, valid, dirty)


def _take(vcpu: VcpuFile, valid: int, dirty: int) -> None:
    """What is taken is no longer marked dirty; what is refused stays marked."""
    memory, state = vcpu.page.memory, vcpu.state
    if dirty & kvm.KVM_SYNC_X86_REGS:
        with vcpu.kvms_own():
            state.unpack_regs(memory[_REGS_AT:_SREGS_AT])
        dirty &= ~kvm.KVM_SYNC_X86_REGS
        _SYNC.pack_into(memory, SYNC_AT, valid, dirty)
    if dirty & kvm.KVM_SYNC_X86_SREGS:
        with vcpu.kvms_own(keep=False):
            if not state.unpack_sregs(memory[_SREGS_AT:_EVENTS_AT]):
                raise Errno(errno.EINVAL)
        dirty &= ~kvm.KVM_SYNC_X86_SREGS
        _SYNC.pack_into(memory, SYNC_AT, valid, dirty)
    if dirty and not state.unpack_events(memory[_EVENTS_AT : _EVENTS_AT + events.SIZE]):
        raise Errno(errno.EINVAL)
    _SYNC.pack_into(memory, SYNC_AT, valid, 0)


def give(vcpu: VcpuFile, valid: int) -> None:
    """After an exit: what user space asked for."""
    if vcpu.protected is not None:
        return
    memory, state = vcpu.page.memory, vcpu.state
    if valid & kvm.KVM_SYNC_X86_REGS:
        memory[_REGS_AT:_SREGS_AT] = state.pack_regs()
    if valid & kvm.KVM_SYNC_X86_SREGS:
        memory[_SREGS_AT:_EVENTS_AT] = state.pack_sregs()
    if valid & kvm.KVM_SYNC_X86_EVENTS:
        memory[_EVENTS_AT : _EVENTS_AT + events.SIZE] = state.pack_events()
