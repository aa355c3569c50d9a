"""The modelled machine: which VM types and capabilities it has, its CPUID, and its SEV firmware.

Capability answers are data. What the model lacks answers 0 here and its ioctls answer ENOTTY, as a kernel built
without the feature does.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING

from kvmapi.abi import caps, kvm
from kvmapi.model.cpu import cpuid, fpu
from kvmapi.model.dirty_log import ALL_OPTIONS
from kvmapi.model.irq.routing import MAX_ROUTES
from kvmapi.model.memslots import USER_SLOTS

if TYPE_CHECKING:
    from kvmapi.model.sev.firmware import Firmware

MAX_VCPUS = 1024
RECOMMENDED_VCPUS = 2
C_BIT = 51
GUEST_DEBUG_MASK = (
    kvm.KVM_GUESTDBG_ENABLE | kvm.KVM_GUESTDBG_SINGLESTEP | kvm.KVM_GUESTDBG_USE_SW_BP | kvm.KVM_GUESTDBG_USE_HW_BP
    | kvm.KVM_GUESTDBG_INJECT_DB | kvm.KVM_GUESTDBG_INJECT_BP | kvm.KVM_GUESTDBG_BLOCKIRQ
)  # fmt: skip
_SEV_EAX = 1 << 1  # CPUID 0x8000001F EAX: SEV
_PRIVATE_TYPES = frozenset((kvm.KVM_X86_SW_PROTECTED_VM,))
SEV_TYPES = frozenset((kvm.KVM_X86_SEV_VM,))

# Capabilities with the same answer at system and VM scope.
_FIXED = {
    caps.KVM_CAP_USER_MEMORY: 1,
    caps.KVM_CAP_USER_MEMORY2: 1,
    caps.KVM_CAP_SET_TSS_ADDR: 1,
    caps.KVM_CAP_SET_IDENTITY_MAP_ADDR: 1,
    caps.KVM_CAP_EXT_CPUID: 1,
    caps.KVM_CAP_NR_VCPUS: RECOMMENDED_VCPUS,
    caps.KVM_CAP_MAX_VCPUS: MAX_VCPUS,
    caps.KVM_CAP_MAX_VCPU_ID: MAX_VCPUS * 4,
    caps.KVM_CAP_NR_MEMSLOTS: USER_SLOTS,
    caps.KVM_CAP_MP_STATE: 1,
    caps.KVM_CAP_DESTROY_MEMORY_REGION_WORKS: 1,
    caps.KVM_CAP_JOIN_MEMORY_REGIONS_WORKS: 1,
    caps.KVM_CAP_IMMEDIATE_EXIT: 1,
    caps.KVM_CAP_CHECK_EXTENSION_VM: 1,
    caps.KVM_CAP_ENABLE_CAP: 1,
    caps.KVM_CAP_ENABLE_CAP_VM: 1,
    caps.KVM_CAP_EXIT_HYPERCALL: 1 << kvm.KVM_HC_MAP_GPA_RANGE,
    caps.KVM_CAP_X86_USER_SPACE_MSR: 1,
    caps.KVM_CAP_X86_MSR_FILTER: 1,
    caps.KVM_CAP_GET_MSR_FEATURES: 1,
    caps.KVM_CAP_SYS_ATTRIBUTES: 1,
    caps.KVM_CAP_MMU_SHADOW_CACHE_CONTROL: 1,
    caps.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: ALL_OPTIONS,
    caps.KVM_CAP_PRE_FAULT_MEMORY: 1,
    caps.KVM_CAP_MEMORY_FAULT_INFO: 1,
    caps.KVM_CAP_GUEST_MEMFD: 1,
    caps.KVM_CAP_INTERNAL_ERROR_DATA: 1,
    caps.KVM_CAP_SYNC_REGS: kvm.KVM_SYNC_X86_REGS | kvm.KVM_SYNC_X86_SREGS | kvm.KVM_SYNC_X86_EVENTS,
    caps.KVM_CAP_SREGS2: 1,
    caps.KVM_CAP_VCPU_EVENTS: 1,
    caps.KVM_CAP_USER_NMI: 1,
    caps.KVM_CAP_DEBUGREGS: 1,
    caps.KVM_CAP_SET_GUEST_DEBUG: 1,
    caps.KVM_CAP_SET_GUEST_DEBUG2: GUEST_DEBUG_MASK,
    caps.KVM_CAP_X86_ROBUST_SINGLESTEP: 1,
    caps.KVM_CAP_XSAVE: 1,
    caps.KVM_CAP_XSAVE2: fpu.XSAVE_SIZE,
    caps.KVM_CAP_XCRS: 1,
    caps.KVM_CAP_GET_TSC_KHZ: 1,
    caps.KVM_CAP_IRQCHIP: 1,
    caps.KVM_CAP_IRQ_ROUTING: MAX_ROUTES,
    caps.KVM_CAP_IRQ_INJECT_STATUS: 1,
    caps.KVM_CAP_SIGNAL_MSI: 1,
    caps.KVM_CAP_IRQFD: 1,
    caps.KVM_CAP_IRQFD_RESAMPLE: 1,
    caps.KVM_CAP_IOEVENTFD: 1,
    caps.KVM_CAP_IOEVENTFD_NO_LENGTH: 1,
    caps.KVM_CAP_IOEVENTFD_ANY_LENGTH: 1,
    caps.KVM_CAP_TSC_DEADLINE_TIMER: 1,
    caps.KVM_CAP_X2APIC_API: kvm.KVM_X2APIC_API_USE_32BIT_IDS | kvm.KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
}


class Platform:
    """One machine. Several VMs share its firmware and its ASIDs.

    `memlock`: apply the caller's RLIMIT_MEMLOCK to pinned memory as the kernel does. Off by default, because the model
    pins nothing and the usual limit of 8 MiB would keep an ordinary user from any SEV guest; the environment variable
    SEVMM_MODEL_MEMLOCK=1 turns it on from outside.
    """

    def __init__(self, *, sev: bool = True, asids: int = 15, memlock: bool | None = None) -> None:
        self.has_sev = sev
        self.memlock = os.environ.get("SEVMM_MODEL_MEMLOCK") == "1" if memlock is None else memlock
        self.asids = asids

    @cached_property
    def firmware(self) -> Firmware:
        """The PSP. Made on first use: it draws keys."""
        from kvmapi.model.sev.firmware import Firmware

        return Firmware(self.asids)

    @property
    def vm_types(self) -> int:
        """KVM_CAP_VM_TYPES."""
        types = 1 << kvm.KVM_X86_DEFAULT_VM | 1 << kvm.KVM_X86_SW_PROTECTED_VM
        return types | (1 << kvm.KVM_X86_SEV_VM if self.has_sev else 0)

    def supported_cpuid(self) -> list[cpuid.Leaf]:
        """KVM_GET_SUPPORTED_CPUID."""
        if not self.has_sev:
            return cpuid.supported(0, 0, 0, 0)
        return cpuid.supported(_SEV_EAX, C_BIT, self.asids, 1)

    def capability(self, number: int, vm_type: int | None) -> int:
        """KVM_CHECK_EXTENSION at system scope (`vm_type` None) or on a VM."""
        if number == caps.KVM_CAP_VM_TYPES:
            return self.vm_types
        private = vm_type is None or has_private_memory(vm_type)
        if number == caps.KVM_CAP_MEMORY_ATTRIBUTES:
            return kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        if number == caps.KVM_CAP_GUEST_MEMFD_FLAGS:
            shared = 0 if vm_type is not None and private else kvm.GUEST_MEMFD_FLAG_INIT_SHARED
            return kvm.GUEST_MEMFD_FLAG_MMAP | shared
        if number == caps.KVM_CAP_READONLY_MEM:
            return 1
        return _FIXED.get(number, 0)


def has_private_memory(vm_type: int) -> bool:
    """Does this VM type have memory attributes and private guest_memfd memory?"""
    return vm_type in _PRIVATE_TYPES
