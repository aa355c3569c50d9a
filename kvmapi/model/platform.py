"""The modelled machine: which VM types and capabilities it has, its CPUID, and its SEV firmware.

Capability answers are data. What the model lacks answers 0 here and its ioctls answer ENOTTY, as a kernel built
without the feature does. SEV guests and SEV-ES guests share one range of ASIDs, which the BIOS splits: SEV-ES has those
below `min_sev_asid`. A VM type is on offer where its part is not empty (7.3: sev_hardware_setup).
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from kvmapi.abi import caps, dialects, kvm
from kvmapi.abi.vmsa import SVM_SEV_FEAT_DEBUG_SWAP
from kvmapi.model.clock import CAPABILITIES as CLOCK_CAPABILITIES
from kvmapi.model.clock import steal
from kvmapi.model.cpu import cpuid, fpu, mce, policy
from kvmapi.model.dirty_log import ALL_OPTIONS
from kvmapi.model.irq.routing import MAX_ROUTES
from kvmapi.model.irq.vm import X2APIC_API
from kvmapi.model.memslots import USER_SLOTS

if TYPE_CHECKING:
    from kvmapi.model.sev.firmware import Firmware
    from kvmapi.model.sev.store import Store

MAX_VCPUS = 1024
RECOMMENDED_VCPUS = 2
C_BIT = 51
GUEST_DEBUG_MASK = (
    kvm.KVM_GUESTDBG_ENABLE | kvm.KVM_GUESTDBG_SINGLESTEP | kvm.KVM_GUESTDBG_USE_SW_BP | kvm.KVM_GUESTDBG_USE_HW_BP
    | kvm.KVM_GUESTDBG_INJECT_DB | kvm.KVM_GUESTDBG_INJECT_BP | kvm.KVM_GUESTDBG_BLOCKIRQ
)  # fmt: skip
_SEV, _SEV_ES = 1 << 1, 1 << 3  # CPUID 0x8000001F EAX
_PRIVATE_TYPES = frozenset((kvm.KVM_X86_SW_PROTECTED_VM,))
SEV_TYPES = frozenset((kvm.KVM_X86_SEV_VM, kvm.KVM_X86_SEV_ES_VM))  # these must not run before KVM_SEV_INIT2
PROTECTED_STATE_TYPES = frozenset((kvm.KVM_X86_SEV_ES_VM,))  # their registers cannot be had after the launch

# Capabilities with the same answer at system and VM scope.
_FIXED = {
    **CLOCK_CAPABILITIES,
    **policy.CAPABILITIES,
    **mce.CAPABILITIES,
    caps.KVM_CAP_ONE_REG: 1,
    caps.KVM_CAP_ENFORCE_PV_FEATURE_CPUID: 1,
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
    caps.KVM_CAP_IRQCHIP: 1,
    caps.KVM_CAP_HLT: 1,
    caps.KVM_CAP_PIT: 1,
    caps.KVM_CAP_PIT2: 1,
    caps.KVM_CAP_PIT_STATE2: 1,
    caps.KVM_CAP_REINJECT_CONTROL: 1,
    caps.KVM_CAP_IRQ_ROUTING: MAX_ROUTES,
    caps.KVM_CAP_IRQ_INJECT_STATUS: 1,
    caps.KVM_CAP_SIGNAL_MSI: 1,
    caps.KVM_CAP_IRQFD: 1,
    caps.KVM_CAP_IRQFD_RESAMPLE: 1,
    caps.KVM_CAP_COALESCED_MMIO: kvm.KVM_COALESCED_MMIO_PAGE_OFFSET,
    caps.KVM_CAP_COALESCED_PIO: 1,
    caps.KVM_CAP_IOEVENTFD: 1,
    caps.KVM_CAP_IOEVENTFD_NO_LENGTH: 1,
    caps.KVM_CAP_IOEVENTFD_ANY_LENGTH: 1,
    caps.KVM_CAP_TSC_DEADLINE_TIMER: 1,
    caps.KVM_CAP_X86_APIC_BUS_CYCLES_NS: 1,
    caps.KVM_CAP_SET_BOOT_CPU_ID: 1,
    caps.KVM_CAP_BINARY_STATS_FD: 1,
    caps.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM: 1,  # whether or not there is SEV, as 7.3 answers
    caps.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM: 1,
    caps.KVM_CAP_X2APIC_API: X2APIC_API,
    caps.KVM_CAP_SPLIT_IRQCHIP: 1,
}


_making = threading.Lock()
os.register_at_fork(after_in_child=_making._at_fork_reinit)  # type: ignore[attr-defined]  # as the standard library does


class Platform:
    """One machine. Several VMs share its firmware and its ASIDs.

    `sev`: it has SEV at all; `es`: kvm_amd runs SEV-ES guests (its parameter sev_es). `asids` is the highest ASID of an
    encrypted guest, and those below `min_sev_asid` are for SEV-ES guests only: 1..4 and 5..15 here, as a first EPYC can
    be set up. ValueError for a split that no BIOS makes.

    `debug_swap`: the processor swaps debug registers with the guest's (Zen 4), so KVM_SEV_INIT2 takes that VMSA feature. Off
    by default, because the modelled CPU is a first EPYC and every feature changes measurements.

    `memlock`: apply the caller's RLIMIT_MEMLOCK to pinned memory as the kernel does. Off by default, because the model
    pins nothing and the usual limit of 8 MiB would keep an ordinary user from any SEV guest; the environment variable
    SEVMM_MODEL_MEMLOCK=1 turns it on from outside.

    `store`: the firmware's non-volatile memory (identity keys); None keeps it in this process.

    `dialect`: whose interface of private memory the kernel has (kvmapi.abi.dialects); ValueError for one that does not exist.
    """

    def __init__(
        self,
        *,
        sev: bool = True,
        es: bool = True,
        asids: int = 15,
        min_sev_asid: int = 5,
        debug_swap: bool = False,
        memlock: bool | None = None,
        store: Store | None = None,
        dialect: str = "mainline",
    ) -> None:
        if sev and not 1 <= min_sev_asid <= asids + 1:
            raise ValueError(f"min_sev_asid {min_sev_asid} does not split ASIDs 1..{asids}: say 1 (none for SEV-ES) to {asids + 1} (all)")
        self.dialect = dialects.dialect(dialect)
        self.has_sev = sev
        self.has_sev_es = sev and es and min_sev_asid > 1
        self.asids = asids
        self.min_sev_asid = min_sev_asid
        self.vmsa_features = SVM_SEV_FEAT_DEBUG_SWAP if debug_swap and self.has_sev_es else 0
        self.memlock = os.environ.get("SEVMM_MODEL_MEMLOCK") == "1" if memlock is None else memlock
        self.store = store
        self._firmware: Firmware | None = None
        self._firmware_of = 0  # the process whose firmware that is

    @property
    def firmware(self) -> Firmware:
        """The PSP. Made on first use; a forked child has another, because this one's keys stay with the parent."""
        firmware, pid = self._firmware, os.getpid()
        if firmware is not None and self._firmware_of == pid:
            return firmware
        from kvmapi.model.sev.firmware import Firmware

        with _making:
            if self._firmware is None or self._firmware_of != pid:
                self._firmware, self._firmware_of = Firmware(self.asids, self.min_sev_asid, self.store), pid
            return self._firmware

    @property
    def vm_types(self) -> int:
        """KVM_CAP_VM_TYPES. SEV is there where it has ASIDs left, SEV-ES where it was given some."""
        types = 1 << kvm.KVM_X86_DEFAULT_VM | 1 << kvm.KVM_X86_SW_PROTECTED_VM
        if self.has_sev and self.min_sev_asid <= self.asids:
            types |= 1 << kvm.KVM_X86_SEV_VM
        if self.has_sev_es:
            types |= 1 << kvm.KVM_X86_SEV_ES_VM
        return types & self.dialect.vm_types

    def supported_cpuid(self) -> list[cpuid.Leaf]:
        """KVM_GET_SUPPORTED_CPUID. SEV stands there even where no ASID is left for such guests."""
        if not self.has_sev:
            return cpuid.supported(0, 0, 0, 0, steal_time=steal.offered())
        sev_eax = _SEV | (_SEV_ES if self.has_sev_es else 0)
        return cpuid.supported(sev_eax, C_BIT, self.asids, self.min_sev_asid, steal_time=steal.offered())

    def host_cpuid(self, function: int, index: int) -> tuple[int, int, int, int]:
        """CPUID of the modelled machine itself (EAX, EBX, ECX, EDX), as a program beside KVM sees it: what guests are offered,
        and what KVM needs or keeps for itself: SVM (nested guests are not offered) and MWAIT; no hypervisor.
        """
        if 0x40000000 <= function < 0x50000000:
            return 0, 0, 0, 0
        if function == cpuid.SVM_LEAF:
            return cpuid.SVM_REVISION, self.asids + 1, 0, cpuid.SVM_FEATURES
        eax, ebx, ecx, edx = cpuid.Table(self.supported_cpuid()).read(function, index)
        if function == 1:
            ecx = ecx & ~cpuid.HYPERVISOR | cpuid.MWAIT
        elif function == 0x80000001:
            ecx |= cpuid.SVM
        return eax, ebx, ecx, edx

    def capability(self, number: int, vm_type: int | None) -> int:
        """KVM_CHECK_EXTENSION at system scope (`vm_type` None) or on a VM."""
        if number in self.dialect.capabilities:
            return self.dialect.capabilities[number]
        if number == caps.KVM_CAP_VM_TYPES:
            return self.vm_types
        private = vm_type is None or has_private_memory(vm_type)
        if number == caps.KVM_CAP_MEMORY_ATTRIBUTES:
            return kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        if number == caps.KVM_CAP_GUEST_MEMFD_FLAGS:
            shared = 0 if vm_type is not None and private else kvm.GUEST_MEMFD_FLAG_INIT_SHARED
            return kvm.GUEST_MEMFD_FLAG_MMAP | shared
        if number == caps.KVM_CAP_STEAL_TIME:
            return int(steal.offered())
        protected = vm_type is not None and has_protected_state(vm_type)
        if number == caps.KVM_CAP_READONLY_MEM:
            return 0 if protected else 1  # a write to such a slot would have to be emulated
        if protected and number == caps.KVM_CAP_SYNC_REGS:
            return 0
        return _FIXED.get(number, 0)


def has_private_memory(vm_type: int) -> bool:
    """Does this VM type have memory attributes and private guest_memfd memory?"""
    return vm_type in _PRIVATE_TYPES


def has_protected_state(vm_type: int) -> bool:
    """Are the registers of this VM type's vCPUs out of reach after the launch (has_protected_state)? Not so for the legacy
    KVM_SEV_ES_INIT, whose VM is of type 0: there the ioctls answer, about state that means nothing any more.
    """
    return vm_type in PROTECTED_STATE_TYPES
