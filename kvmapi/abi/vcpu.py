"""Argument structs of ioctls on a vCPU: registers, MSRs, CPUID, FPU, events, debugging.

`kvm_segment` and `kvm_dtable` are the unpacked, KVM form of a descriptor; the packed form a VMSA has lives with
whoever reads VMSAs.
"""

from __future__ import annotations

from ctypes import Structure
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

GENERAL_REGISTERS = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)  # fmt: skip

KVM_NR_INTERRUPTS = 256
KVM_APIC_REG_SIZE = 0x400
KVM_MAX_XCRS = 16


class kvm_regs(Structure):
    """KVM_{GET,SET}_REGS."""

    _fields_ = [(name, u64) for name in GENERAL_REGISTERS]


class kvm_segment(Structure):
    """A segment register: `limit` is the expanded one, `type` the low four access bits."""

    _fields_ = [
        ("base", u64),
        ("limit", u32),
        ("selector", u16),
        ("type", u8),
        ("present", u8),
        ("dpl", u8),
        ("db", u8),
        ("s", u8),
        ("l", u8),
        ("g", u8),
        ("avl", u8),
        ("unusable", u8),
        ("padding", u8),
    ]


class kvm_dtable(Structure):
    """GDTR or IDTR."""

    _fields_ = [("base", u64), ("limit", u16), ("padding", u16 * 3)]


_SYSTEM_REGISTERS: list[tuple[str, type]] = [
    ("cs", kvm_segment),
    ("ds", kvm_segment),
    ("es", kvm_segment),
    ("fs", kvm_segment),
    ("gs", kvm_segment),
    ("ss", kvm_segment),
    ("tr", kvm_segment),
    ("ldt", kvm_segment),
    ("gdt", kvm_dtable),
    ("idt", kvm_dtable),
    ("cr0", u64),
    ("cr2", u64),
    ("cr3", u64),
    ("cr4", u64),
    ("cr8", u64),
    ("efer", u64),
    ("apic_base", u64),
]


class kvm_sregs(Structure):
    """KVM_{GET,SET}_SREGS."""

    _fields_ = [*_SYSTEM_REGISTERS, ("interrupt_bitmap", u64 * (KVM_NR_INTERRUPTS // 64))]


class kvm_sregs2(Structure):
    """KVM_{GET,SET}_SREGS2: PDPTRs instead of the pending-interrupt bitmap."""

    _fields_ = [*_SYSTEM_REGISTERS, ("flags", u64), ("pdptrs", u64 * 4)]


class kvm_fpu(Structure):
    """KVM_{GET,SET}_FPU."""

    _fields_ = [
        ("fpr", u8 * 16 * 8),
        ("fcw", u16),
        ("fsw", u16),
        ("ftwx", u8),
        ("pad1", u8),
        ("last_opcode", u16),
        ("last_ip", u64),
        ("last_dp", u64),
        ("xmm", u8 * 16 * 16),
        ("mxcsr", u32),
        ("pad2", u32),
    ]


class kvm_xsave(Structure):
    """KVM_{GET,SET}_XSAVE: a 4 KiB XSAVE image in standard format; KVM_GET_XSAVE2 may append to it."""

    _fields_ = [("region", u32 * 1024)]


class kvm_xcr(Structure):
    """One extended control register."""

    _fields_ = [("xcr", u32), ("reserved", u32), ("value", u64)]


class kvm_xcrs(Structure):
    """KVM_{GET,SET}_XCRS."""

    _fields_ = [("nr_xcrs", u32), ("flags", u32), ("xcrs", kvm_xcr * KVM_MAX_XCRS), ("padding", u64 * 16)]


class kvm_msr_entry(Structure):
    """One MSR."""

    _fields_ = [("index", u32), ("reserved", u32), ("data", u64)]


class kvm_msrs(Structure):
    """Header of KVM_{GET,SET}_MSRS; `nmsrs` kvm_msr_entry follow."""

    _fields_ = [("nmsrs", u32), ("pad", u32)]


class kvm_cpuid_entry(Structure):
    """One leaf of KVM_SET_CPUID."""

    _fields_ = [("function", u32), ("eax", u32), ("ebx", u32), ("ecx", u32), ("edx", u32), ("padding", u32)]


class kvm_cpuid(Structure):
    """Header of KVM_SET_CPUID; `nent` kvm_cpuid_entry follow."""

    _fields_ = [("nent", u32), ("padding", u32)]


class kvm_cpuid_entry2(Structure):
    """One leaf and subleaf."""

    _fields_ = [
        ("function", u32),
        ("index", u32),
        ("flags", u32),
        ("eax", u32),
        ("ebx", u32),
        ("ecx", u32),
        ("edx", u32),
        ("padding", u32 * 3),
    ]


class kvm_cpuid2(Structure):
    """Header of the CPUID2 ioctls; `nent` kvm_cpuid_entry2 follow."""

    _fields_ = [("nent", u32), ("padding", u32)]


class kvm_lapic_state(Structure):
    """KVM_{GET,SET}_LAPIC: the first KiB of the APIC page."""

    _fields_ = [("regs", u8 * KVM_APIC_REG_SIZE)]


class kvm_translation(Structure):
    """KVM_TRANSLATE: guest virtual in, guest physical out."""

    _fields_ = [
        ("linear_address", u64),
        ("physical_address", u64),
        ("valid", u8),
        ("writeable", u8),
        ("usermode", u8),
        ("pad", u8 * 5),
    ]


class kvm_interrupt(Structure):
    """KVM_INTERRUPT: a vector."""

    _fields_ = [("irq", u32)]


class kvm_signal_mask(Structure):
    """Header of KVM_SET_SIGNAL_MASK; `len` (8) bytes of signal set follow."""

    _fields_ = [("len", u32)]


class kvm_tpr_access_ctl(Structure):
    """KVM_TPR_ACCESS_REPORTING."""

    _fields_ = [("enabled", u32), ("flags", u32), ("reserved", u32 * 8)]


class kvm_vapic_addr(Structure):
    """KVM_SET_VAPIC_ADDR."""

    _fields_ = [("vapic_addr", u64)]


class kvm_mp_state(Structure):
    """KVM_{GET,SET}_MP_STATE: KVM_MP_STATE_*."""

    _fields_ = [("mp_state", u32)]


class kvm_guest_debug_arch(Structure):
    """Hardware breakpoints, in DR0..DR7."""

    _fields_ = [("debugreg", u64 * 8)]


class kvm_guest_debug(Structure):
    """KVM_SET_GUEST_DEBUG: KVM_GUESTDBG_*."""

    _fields_ = [("control", u32), ("pad", u32), ("arch", kvm_guest_debug_arch)]


class kvm_breakpoint(Structure):
    """Part of KVM_DEBUG_GUEST."""

    _fields_ = [("enabled", u32), ("padding", u32), ("address", u64)]


class kvm_debug_guest(Structure):
    """KVM_DEBUG_GUEST, withdrawn."""

    _fields_ = [("enabled", u32), ("pad", u32), ("breakpoints", kvm_breakpoint * 4), ("singlestep", u32)]


class kvm_debugregs(Structure):
    """KVM_{GET,SET}_DEBUGREGS."""

    _fields_ = [("db", u64 * 4), ("dr6", u64), ("dr7", u64), ("flags", u64), ("reserved", u64 * 9)]


class _exception(Structure):
    _fields_ = [("injected", u8), ("nr", u8), ("has_error_code", u8), ("pending", u8), ("error_code", u32)]


class _interrupt(Structure):
    _fields_ = [("injected", u8), ("nr", u8), ("soft", u8), ("shadow", u8)]


class _nmi(Structure):
    _fields_ = [("injected", u8), ("pending", u8), ("masked", u8), ("pad", u8)]


class _smi(Structure):
    _fields_ = [("smm", u8), ("pending", u8), ("smm_inside_nmi", u8), ("latched_init", u8)]


class _triple_fault(Structure):
    _fields_ = [("pending", u8)]


class kvm_vcpu_events(Structure):
    """KVM_{GET,SET}_VCPU_EVENTS."""

    _fields_ = [
        ("exception", _exception),
        ("interrupt", _interrupt),
        ("nmi", _nmi),
        ("sipi_vector", u32),
        ("flags", u32),
        ("smi", _smi),
        ("triple_fault", _triple_fault),
        ("reserved", u8 * 26),
        ("exception_has_payload", u8),
        ("exception_payload", u64),
    ]


class kvm_x86_mce(Structure):
    """KVM_X86_SET_MCE."""

    _fields_ = [
        ("status", u64),
        ("addr", u64),
        ("misc", u64),
        ("mcg_status", u64),
        ("bank", u8),
        ("pad1", u8 * 7),
        ("pad2", u64 * 3),
    ]


class kvm_nested_state(Structure):
    """Header (128 bytes) of KVM_{GET,SET}_NESTED_STATE; `size` counts it and the VMCB or VMCSs that follow."""

    _fields_ = [("flags", u16), ("format", u16), ("size", u32), ("hdr", u64 * 15)]


class kvm_one_reg(Structure):
    """KVM_{GET,SET}_ONE_REG: the value lies at `addr`."""

    _fields_ = [("id", u64), ("addr", u64)]


class kvm_reg_list(Structure):
    """Header of KVM_GET_REG_LIST; `n` u64 ids follow."""

    _fields_ = [("n", u64)]


class kvm_pre_fault_memory(Structure):
    """KVM_PRE_FAULT_MEMORY: [gpa, gpa+size); comes back with what is left to do."""

    _fields_ = [("gpa", u64), ("size", u64), ("flags", u64), ("padding", u64 * 5)]


class kvm_sync_regs(Structure):
    """The registers kvm_run can carry (KVM_CAP_SYNC_REGS)."""

    _fields_ = [("regs", kvm_regs), ("sregs", kvm_sregs), ("events", kvm_vcpu_events)]
