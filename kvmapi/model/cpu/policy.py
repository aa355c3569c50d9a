"""What user space chose for a VM's processors: the capabilities that it enabled, the quirks that it disabled.

One object per VM, read by every vCPU's processor; `enable` is KVM_ENABLE_CAP of the capabilities that are nothing but a
choice here. A quirk is a behaviour that KVM keeps for old user space and drops where it was disabled; KVM never takes
that back. On offer are those whose two behaviours the model has, and those that nobody inside or outside the guest
can tell apart here (CD_NW_CLEARED, SLOT_ZAP_ALL, IGNORE_GUEST_PAT). Source: kvm_vm_ioctl_enable_cap in
arch/x86/kvm/x86.c (7.3), Documentation/virt/kvm/api.rst 7.31.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmapi.abi import caps, kvm
from kvmapi.model.caller import Errno
from kvmapi.model.msr_filter import MsrFilter

if TYPE_CHECKING:
    from kvmapi.model.irq.kernel_bus import KernelBus

QUIRKS = (
    kvm.KVM_X86_QUIRK_CD_NW_CLEARED | kvm.KVM_X86_QUIRK_OUT_7E_INC_RIP | kvm.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT
    | kvm.KVM_X86_QUIRK_FIX_HYPERCALL_INSN | kvm.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS | kvm.KVM_X86_QUIRK_SLOT_ZAP_ALL
    | kvm.KVM_X86_QUIRK_STUFF_FEATURE_MSRS | kvm.KVM_X86_QUIRK_IGNORE_GUEST_PAT
)  # fmt: skip
CAPABILITIES = {
    caps.KVM_CAP_DISABLE_QUIRKS: 1,
    caps.KVM_CAP_DISABLE_QUIRKS2: QUIRKS,
    caps.KVM_CAP_MSR_PLATFORM_INFO: 1,
    caps.KVM_CAP_EXIT_ON_EMULATION_FAILURE: 1,
    caps.KVM_CAP_X86_TRIPLE_FAULT_EVENT: 1,
}
"""What KVM_CHECK_EXTENSION answers for the capabilities that `ExitPolicy.enable` takes."""


@dataclass(slots=True)
class ExitPolicy:
    """What user space asked to see, per VM: KVM_CAP_EXIT_HYPERCALL's mask, KVM_CAP_X86_USER_SPACE_MSR's reasons, the MSRs
    that the guest must not touch itself, and what `enable` sets.
    """

    hypercalls: int = 0
    msr_reasons: int = 0
    msr_filter: MsrFilter | None = None
    bus: KernelBus | None = None  # I/O that the VM answers itself
    disabled_quirks: int = kvm.KVM_X86_QUIRK_IGNORE_GUEST_PAT  # kvm_amd never had that one
    reads_platform_info: bool = True  # the guest may read MSR_PLATFORM_INFO
    exit_on_emulation_failure: bool = False  # of user code too, which gets #UD otherwise
    triple_fault_event: bool = False  # KVM_SET_VCPU_EVENTS knows of triple faults

    def has_quirk(self, quirk: int) -> bool:
        """Does KVM still behave as it always did?"""
        return not self.disabled_quirks & quirk

    def enable(self, cap: int, first: int) -> bool:
        """KVM_ENABLE_CAP with the argument `first`; False where `cap` is none of these. Errno: EINVAL."""
        if cap in (caps.KVM_CAP_DISABLE_QUIRKS, caps.KVM_CAP_DISABLE_QUIRKS2):
            if cap == caps.KVM_CAP_DISABLE_QUIRKS2 and first & ~QUIRKS:
                raise Errno(errno.EINVAL)
            self.disabled_quirks |= first & QUIRKS
        elif cap == caps.KVM_CAP_MSR_PLATFORM_INFO:
            self.reads_platform_info = bool(first)
        elif cap == caps.KVM_CAP_EXIT_ON_EMULATION_FAILURE:
            if first & ~1:
                raise Errno(errno.EINVAL)
            self.exit_on_emulation_failure = bool(first)
        elif cap == caps.KVM_CAP_X86_TRIPLE_FAULT_EVENT:
            self.triple_fault_event = bool(first)
        else:
            return False
        return True
