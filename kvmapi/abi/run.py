"""struct kvm_run: the page a vCPU shares with user space, with one struct per exit.

The exit's struct lies in a 256-byte union at offset 32; which member is valid follows from `exit_reason`. The
members have the kernel's names, so `run.io.port` is `run->io.port`. The whole mapping is larger than the struct:
port data follows on the next page (`kvm_exit_io.data_offset` says where).

Writers must be careful: user space and the guest's other half (the kernel) share these bytes. Take a copy of a
value that you check, and use the copy.
"""

from __future__ import annotations

from ctypes import Structure, Union
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

from kvmapi.abi.vcpu import kvm_sync_regs
from kvmapi.abi.xen import kvm_hyperv_exit, kvm_xen_exit

EXIT_UNION_OFFSET = 32
EXIT_UNION_SIZE = 256
SYNC_REGS_SIZE_BYTES = 2048


class kvm_exit_hw(Structure):
    _fields_ = [("hardware_exit_reason", u64)]


class kvm_exit_fail_entry(Structure):
    _fields_ = [("hardware_entry_failure_reason", u64), ("cpu", u32)]


class kvm_exit_ex(Structure):
    _fields_ = [("exception", u32), ("error_code", u32)]


class kvm_exit_io(Structure):
    """`count` items of `size` bytes at `data_offset` from the start of kvm_run."""

    _fields_ = [("direction", u8), ("size", u8), ("port", u16), ("count", u32), ("data_offset", u64)]


class kvm_debug_exit_arch(Structure):
    _fields_ = [("exception", u32), ("pad", u32), ("pc", u64), ("dr6", u64), ("dr7", u64)]


class kvm_exit_debug(Structure):
    _fields_ = [("arch", kvm_debug_exit_arch)]


class kvm_exit_mmio(Structure):
    _fields_ = [("phys_addr", u64), ("data", u8 * 8), ("len", u32), ("is_write", u8)]


class _hypercall_flags(Union):
    _fields_ = [("longmode", u32), ("flags", u64)]


class kvm_exit_hypercall(Structure):
    _anonymous_ = ("_u",)
    _fields_ = [("nr", u64), ("args", u64 * 6), ("ret", u64), ("_u", _hypercall_flags)]


class kvm_exit_tpr_access(Structure):
    _fields_ = [("rip", u64), ("is_write", u32), ("pad", u32)]


class kvm_exit_s390_sieic(Structure):
    _fields_ = [("icptcode", u8), ("ipa", u16), ("ipb", u32)]


class kvm_exit_s390_ucontrol(Structure):
    _fields_ = [("trans_exc_code", u64), ("pgm_code", u32)]


class kvm_exit_dcr(Structure):
    _fields_ = [("dcrn", u32), ("data", u32), ("is_write", u8)]


class kvm_exit_internal(Structure):
    _fields_ = [("suberror", u32), ("ndata", u32), ("data", u64 * 16)]


class kvm_exit_emulation_failure(Structure):
    """The same bytes as `internal`, when suberror is KVM_INTERNAL_ERROR_EMULATION."""

    _fields_ = [
        ("suberror", u32),
        ("ndata", u32),
        ("flags", u64),
        ("insn_size", u8),
        ("insn_bytes", u8 * 15),
    ]


class kvm_exit_osi(Structure):
    _fields_ = [("gprs", u64 * 32)]


class kvm_exit_papr_hcall(Structure):
    _fields_ = [("nr", u64), ("ret", u64), ("args", u64 * 9)]


class kvm_exit_s390_tsch(Structure):
    _fields_ = [
        ("subchannel_id", u16),
        ("subchannel_nr", u16),
        ("io_int_parm", u32),
        ("io_int_word", u32),
        ("ipb", u32),
        ("dequeued", u8),
    ]


class kvm_exit_epr(Structure):
    _fields_ = [("epr", u32)]


class _event_data(Union):
    _fields_ = [("flags", u64), ("data", u64 * 16)]


class kvm_exit_system_event(Structure):
    _anonymous_ = ("_u",)
    _fields_ = [("type", u32), ("ndata", u32), ("_u", _event_data)]


class kvm_exit_s390_stsi(Structure):
    _fields_ = [("addr", u64), ("ar", u8), ("reserved", u8), ("fc", u8), ("sel1", u8), ("sel2", u16)]


class kvm_exit_eoi(Structure):
    _fields_ = [("vector", u8)]


class kvm_exit_arm_nisv(Structure):
    _fields_ = [("esr_iss", u64), ("fault_ipa", u64)]


class kvm_exit_msr(Structure):
    """RDMSR and WRMSR: user space answers in `error` and `data`."""

    _fields_ = [("error", u8), ("pad", u8 * 7), ("reason", u32), ("index", u32), ("data", u64)]


class kvm_exit_riscv_sbi(Structure):
    _fields_ = [("extension_id", u64), ("function_id", u64), ("args", u64 * 6), ("ret", u64 * 2)]


class kvm_exit_riscv_csr(Structure):
    _fields_ = [("csr_num", u64), ("new_value", u64), ("write_mask", u64), ("ret_value", u64)]


class kvm_exit_notify(Structure):
    _fields_ = [("flags", u32)]


class kvm_exit_memory_fault(Structure):
    """`flags` KVM_MEMORY_EXIT_FLAG_PRIVATE; [gpa, gpa+size) in bytes."""

    _fields_ = [("flags", u64), ("gpa", u64), ("size", u64)]


class _tdx_unknown(Structure):
    _fields_ = [("ret", u64), ("data", u64 * 5)]


class _tdx_get_quote(Structure):
    _fields_ = [("ret", u64), ("gpa", u64), ("size", u64)]


class _tdx_get_tdvmcall_info(Structure):
    _fields_ = [("ret", u64), ("leaf", u64), ("r11", u64), ("r12", u64), ("r13", u64), ("r14", u64)]


class _tdx_setup_event_notify(Structure):
    _fields_ = [("ret", u64), ("vector", u64)]


class _tdx(Union):
    _fields_ = [
        ("unknown", _tdx_unknown),
        ("get_quote", _tdx_get_quote),
        ("get_tdvmcall_info", _tdx_get_tdvmcall_info),
        ("setup_event_notify", _tdx_setup_event_notify),
    ]


class kvm_exit_tdx(Structure):
    _anonymous_ = ("_u",)
    _fields_ = [("flags", u64), ("nr", u64), ("_u", _tdx)]


class kvm_exit_arm_sea(Structure):
    _fields_ = [("flags", u64), ("esr", u64), ("gva", u64), ("gpa", u64)]


class kvm_exit_snp_req_certs(Structure):
    _fields_ = [("gpa", u64), ("npages", u64), ("ret", u64)]


class kvm_run_exit(Union):
    """The exit union; its members are visible on `kvm_run` directly."""

    _fields_ = [
        ("hw", kvm_exit_hw),
        ("fail_entry", kvm_exit_fail_entry),
        ("ex", kvm_exit_ex),
        ("io", kvm_exit_io),
        ("debug", kvm_exit_debug),
        ("mmio", kvm_exit_mmio),
        ("iocsr_io", kvm_exit_mmio),
        ("hypercall", kvm_exit_hypercall),
        ("tpr_access", kvm_exit_tpr_access),
        ("s390_sieic", kvm_exit_s390_sieic),
        ("s390_reset_flags", u64),
        ("s390_ucontrol", kvm_exit_s390_ucontrol),
        ("dcr", kvm_exit_dcr),
        ("internal", kvm_exit_internal),
        ("emulation_failure", kvm_exit_emulation_failure),
        ("osi", kvm_exit_osi),
        ("papr_hcall", kvm_exit_papr_hcall),
        ("s390_tsch", kvm_exit_s390_tsch),
        ("epr", kvm_exit_epr),
        ("system_event", kvm_exit_system_event),
        ("s390_stsi", kvm_exit_s390_stsi),
        ("eoi", kvm_exit_eoi),
        ("hyperv", kvm_hyperv_exit),
        ("arm_nisv", kvm_exit_arm_nisv),
        ("msr", kvm_exit_msr),
        ("xen", kvm_xen_exit),
        ("riscv_sbi", kvm_exit_riscv_sbi),
        ("riscv_csr", kvm_exit_riscv_csr),
        ("notify", kvm_exit_notify),
        ("memory_fault", kvm_exit_memory_fault),
        ("tdx", kvm_exit_tdx),
        ("arm_sea", kvm_exit_arm_sea),
        ("snp_req_certs", kvm_exit_snp_req_certs),
        ("padding", u8 * EXIT_UNION_SIZE),
    ]


class _sync(Union):
    _fields_ = [("regs", kvm_sync_regs), ("padding", u8 * SYNC_REGS_SIZE_BYTES)]


class kvm_run(Structure):
    """What KVM_RUN reads and writes; map it from the vCPU's fd, KVM_GET_VCPU_MMAP_SIZE bytes."""

    _anonymous_ = ("_exit",)
    _fields_ = [
        ("request_interrupt_window", u8),
        ("immediate_exit", u8),
        ("padding1", u8 * 6),
        ("exit_reason", u32),
        ("ready_for_interrupt_injection", u8),
        ("if_flag", u8),
        ("flags", u16),
        ("cr8", u64),
        ("apic_base", u64),
        ("_exit", kvm_run_exit),
        ("kvm_valid_regs", u64),
        ("kvm_dirty_regs", u64),
        ("s", _sync),
    ]
