"""Rows of a vCPU's fd.

Written as a table on purpose: name, struct, how the argument travels, capability, words. `E(struct, field)` stands
for a header whose `field` says how many `struct` follow.
"""

from __future__ import annotations

from ctypes import c_uint8 as u8
from ctypes import c_uint64 as u64
from typing import NamedTuple

from kvmapi.abi import ioctls
from kvmapi.abi import sev as c
from kvmapi.abi import structs as s
from kvmapi.abi import vcpu as v
from kvmapi.abi import xen as x
from kvmapi.rows import AnyStruct, ArgKind, EntryType, Ioctl


class E(NamedTuple):
    """Entries after a header."""

    entry: EntryType
    field: str


# fmt: off
_ROWS: tuple[tuple[str, AnyStruct | None, ArgKind | E, str | None, str], ...] = (
    ("RUN", None, "none", None, "run the guest until it exits; what happened is in kvm_run"),
    ("GET_REGS", v.kvm_regs, "out", None, "read the general registers"),
    ("SET_REGS", v.kvm_regs, "in", None, "write the general registers"),
    ("GET_SREGS", v.kvm_sregs, "out", None, "read segments, control registers and EFER"),
    ("SET_SREGS", v.kvm_sregs, "in", None, "write segments, control registers and EFER"),
    ("GET_SREGS2", v.kvm_sregs2, "out", "SREGS2", "the same, with PDPTRs"),
    ("SET_SREGS2", v.kvm_sregs2, "in", "SREGS2", "the same, with PDPTRs"),
    ("GET_MSRS", v.kvm_msrs, E(v.kvm_msr_entry, "nmsrs"), None, "read MSRs; returns how many were read"),
    ("SET_MSRS", v.kvm_msrs, E(v.kvm_msr_entry, "nmsrs"), None, "write MSRs; returns how many were written"),
    ("SET_CPUID2", v.kvm_cpuid2, E(v.kvm_cpuid_entry2, "nent"), "EXT_CPUID", "choose what CPUID answers"),
    ("GET_CPUID2", v.kvm_cpuid2, E(v.kvm_cpuid_entry2, "nent"), "EXT_CPUID", "read what CPUID answers"),
    ("SET_CPUID", v.kvm_cpuid, E(v.kvm_cpuid_entry, "nent"), None, "choose what CPUID answers (no subleaves)"),
    ("PRE_FAULT_MEMORY", v.kvm_pre_fault_memory, "inout", "PRE_FAULT_MEMORY", "map guest memory before it is touched"),
    ("TRANSLATE", v.kvm_translation, "inout", None, "walk the guest's page tables"),
    ("INTERRUPT", v.kvm_interrupt, "in", None, "inject an external interrupt (no in-kernel APIC)"),
    ("NMI", None, "none", "USER_NMI", "inject a non-maskable interrupt"),
    ("SMI", None, "none", "X86_SMM", "inject a system management interrupt"),
    ("SET_SIGNAL_MASK", v.kvm_signal_mask, E(u8, "len"), None, "choose the signal mask while KVM_RUN runs"),
    ("GET_FPU", v.kvm_fpu, "out", None, "read x87 and SSE state"),
    ("SET_FPU", v.kvm_fpu, "in", None, "write x87 and SSE state"),
    ("GET_XSAVE", v.kvm_xsave, "out", "XSAVE", "read the extended state, 4 KiB"),
    ("GET_XSAVE2", v.kvm_xsave, "out", "XSAVE2", "read the extended state, as long as KVM_CAP_XSAVE2 says"),
    ("SET_XSAVE", v.kvm_xsave, "in", "XSAVE", "write the extended state"),
    ("GET_XCRS", v.kvm_xcrs, "out", "XCRS", "read extended control registers"),
    ("SET_XCRS", v.kvm_xcrs, "in", "XCRS", "write extended control registers"),
    ("GET_LAPIC", v.kvm_lapic_state, "out", "IRQCHIP", "read the in-kernel local APIC"),
    ("SET_LAPIC", v.kvm_lapic_state, "in", "IRQCHIP", "write the in-kernel local APIC"),
    ("GET_MP_STATE", v.kvm_mp_state, "out", "MP_STATE", "read whether the vCPU runs, halts or waits to be started"),
    ("SET_MP_STATE", v.kvm_mp_state, "in", "MP_STATE", "write it"),
    ("GET_VCPU_EVENTS", v.kvm_vcpu_events, "out", "VCPU_EVENTS", "read pending exceptions, interrupts, NMI and SMI"),
    ("SET_VCPU_EVENTS", v.kvm_vcpu_events, "in", "VCPU_EVENTS", "write them"),
    ("GET_DEBUGREGS", v.kvm_debugregs, "out", "DEBUGREGS", "read the guest's debug registers"),
    ("SET_DEBUGREGS", v.kvm_debugregs, "in", "DEBUGREGS", "write the guest's debug registers"),
    ("SET_GUEST_DEBUG", v.kvm_guest_debug, "in", "SET_GUEST_DEBUG", "single-step or break for the VMM"),
    ("GET_NESTED_STATE", v.kvm_nested_state, "inout", "NESTED_STATE", "read the state of a nested guest"),
    ("SET_NESTED_STATE", v.kvm_nested_state, "in", "NESTED_STATE", "write the state of a nested guest"),
    ("GET_ONE_REG", v.kvm_one_reg, "in", "ONE_REG", "read one register into the buffer at addr"),
    ("SET_ONE_REG", v.kvm_one_reg, "in", "ONE_REG", "write one register from the buffer at addr"),
    ("GET_REG_LIST", v.kvm_reg_list, E(u64, "n"), "ONE_REG", "list the registers of ONE_REG"),
    ("ENABLE_CAP", s.kvm_enable_cap, "in", "ENABLE_CAP", "switch on a capability for this vCPU"),
    ("TPR_ACCESS_REPORTING", v.kvm_tpr_access_ctl, "inout", "VAPIC", "exit when the guest touches its task priority"),
    ("SET_VAPIC_ADDR", v.kvm_vapic_addr, "in", "VAPIC", "say where the virtual APIC page is"),
    ("X86_SETUP_MCE", u64, "in", "MCE", "set up machine checks, as MCG_CAP"),
    ("X86_SET_MCE", v.kvm_x86_mce, "in", "MCE", "inject a machine check"),
    ("SET_TSC_KHZ", None, "value", "TSC_CONTROL", "set this vCPU's TSC frequency, in kHz"),
    ("GET_TSC_KHZ", None, "none", "GET_TSC_KHZ", "read it, in kHz"),
    ("KVMCLOCK_CTRL", None, "none", "KVMCLOCK_CTRL", "tell the guest's watchdog that it was paused"),
    ("SET_DEVICE_ATTR", s.kvm_device_attr, "in", "VCPU_ATTRIBUTES", "write an attribute of the vCPU"),
    ("GET_DEVICE_ATTR", s.kvm_device_attr, "in", "VCPU_ATTRIBUTES", "read an attribute of the vCPU"),
    ("HAS_DEVICE_ATTR", s.kvm_device_attr, "in", "VCPU_ATTRIBUTES", "ask whether the vCPU has an attribute"),
    ("GET_SUPPORTED_HV_CPUID", v.kvm_cpuid2, E(v.kvm_cpuid_entry2, "nent"), "HYPERV_CPUID",
     "Hyper-V CPUID leaves that KVM can give this vCPU"),
    ("GET_STATS_FD", None, "none", "BINARY_STATS_FD", "open the vCPU's statistics; returns an fd"),
    ("XEN_VCPU_GET_ATTR", x.kvm_xen_vcpu_attr, "inout", "XEN_HVM", "read a Xen attribute of the vCPU"),
    ("XEN_VCPU_SET_ATTR", x.kvm_xen_vcpu_attr, "in", "XEN_HVM", "write a Xen attribute of the vCPU"),
    ("DEBUG_GUEST", v.kvm_debug_guest, "in", None, "withdrawn: debugging before KVM_SET_GUEST_DEBUG"),
    ("MEMORY_ENCRYPT_OP", c.kvm_sev_cmd, "inout", None, "run a TDX command on this vCPU (SEV has none)"),
)
# fmt: on


def _row(name: str, struct: AnyStruct | None, arg: ArgKind | E, capability: str | None, words: str) -> Ioctl:
    kind: ArgKind = "header+entries" if isinstance(arg, E) else arg
    entry, count = arg if isinstance(arg, E) else (None, None)
    cap = None if capability is None else f"KVM_CAP_{capability}"
    return Ioctl(f"KVM_{name}", getattr(ioctls, f"KVM_{name}"), "vcpu", struct, kind, cap, words, entry, count)


VCPU: tuple[Ioctl, ...] = tuple(_row(*row) for row in _ROWS)
