"""The GHCB: the page, and the MSR, through which an SEV-ES guest talks to its hypervisor.

Names are the kernel's (arch/x86/include/asm/svm.h, sev-common.h, arch/x86/include/uapi/asm/svm.h, sev-guest's error
numbers); the protocol is AMD's "SEV-ES Guest-Hypervisor Communication Block Standardization". Bit n of `valid_bitmap`
says that the guest filled in the quadword at offset 8 * n of the page.
"""

from __future__ import annotations

from ctypes import Structure
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

GHCB_SIZE = 4096
GHCB_SHARED_BUF_SIZE = 2032
GHCB_DEFAULT_USAGE = 0
GHCB_PROTOCOL_MIN, GHCB_PROTOCOL_MAX = 1, 2  # what KVM speaks
GHCB_SCRATCH_AREA_LIMIT = 16 * 4096  # of a buffer outside the GHCB, which version 1 allows

MSR_AMD64_SEV_ES_GHCB = 0xC0010130
X86_TRAP_VC = 29


class ghcb_save_area(Structure):
    """The registers in a GHCB, at the offsets they have in a VMSA."""

    _pack_ = 1
    _fields_ = [
        ("reserved_0x0", u8 * 203),
        ("cpl", u8),
        ("reserved_0xcc", u8 * 116),
        ("xss", u64),
        ("reserved_0x148", u8 * 24),
        ("dr7", u64),
        ("reserved_0x168", u8 * 16),
        ("rip", u64),
        ("reserved_0x180", u8 * 88),
        ("rsp", u64),
        ("reserved_0x1e0", u8 * 24),
        ("rax", u64),
        ("reserved_0x200", u8 * 264),
        ("rcx", u64),
        ("rdx", u64),
        ("rbx", u64),
        ("reserved_0x320", u8 * 8),
        *((name, u64) for name in ("rbp", "rsi", "rdi")),
        *((f"r{n}", u64) for n in range(8, 16)),
        ("reserved_0x380", u8 * 16),
        *((name, u64) for name in ("sw_exit_code", "sw_exit_info_1", "sw_exit_info_2", "sw_scratch")),
        ("reserved_0x3b0", u8 * 56),
        ("xcr0", u64),
        ("valid_bitmap", u8 * 16),
        ("x87_state_gpa", u64),
    ]


class ghcb(Structure):
    """One GHCB, 4096 bytes, in memory that the guest shares with the hypervisor."""

    _pack_ = 1
    _fields_ = [
        ("save", ghcb_save_area),
        ("reserved_save", u8 * (2048 - 0x408)),
        ("shared_buffer", u8 * GHCB_SHARED_BUF_SIZE),
        ("reserved_0xff0", u8 * 10),
        ("protocol_version", u16),
        ("ghcb_usage", u32),
    ]


# ---- the MSR protocol: bits 11:0 of the MSR; 0 there means that it holds a GHCB's GPA
GHCB_MSR_INFO_MASK = 0xFFF
GHCB_MSR_SEV_INFO_RESP, GHCB_MSR_SEV_INFO_REQ = 0x001, 0x002
GHCB_MSR_VER_MAX_POS, GHCB_MSR_VER_MIN_POS, GHCB_MSR_CBIT_POS = 48, 32, 24
GHCB_MSR_CPUID_REQ, GHCB_MSR_CPUID_RESP = 0x004, 0x005
GHCB_MSR_CPUID_FUNC_POS, GHCB_MSR_CPUID_FUNC_MASK = 32, 0xFFFFFFFF
GHCB_MSR_CPUID_REG_POS, GHCB_MSR_CPUID_REG_MASK = 30, 3  # EAX, EBX, ECX, EDX
GHCB_MSR_CPUID_VALUE_POS, GHCB_MSR_CPUID_VALUE_MASK = 32, 0xFFFFFFFF
GHCB_MSR_AP_RESET_HOLD_REQ, GHCB_MSR_AP_RESET_HOLD_RESP = 0x006, 0x007
GHCB_MSR_AP_RESET_HOLD_RESULT_POS, GHCB_MSR_AP_RESET_HOLD_RESULT_MASK = 12, (1 << 52) - 1
GHCB_MSR_PREF_GPA_REQ, GHCB_MSR_PREF_GPA_RESP = 0x010, 0x011
GHCB_MSR_REG_GPA_REQ, GHCB_MSR_REG_GPA_RESP = 0x012, 0x013
GHCB_MSR_PSC_REQ, GHCB_MSR_PSC_RESP = 0x014, 0x015
GHCB_MSR_HV_FT_REQ, GHCB_MSR_HV_FT_RESP = 0x080, 0x081
GHCB_MSR_HV_FT_POS, GHCB_MSR_HV_FT_MASK = 12, (1 << 52) - 1
GHCB_MSR_TERM_REQ = 0x100
GHCB_MSR_TERM_REASON_SET_POS, GHCB_MSR_TERM_REASON_SET_MASK = 12, 0xF
GHCB_MSR_TERM_REASON_POS, GHCB_MSR_TERM_REASON_MASK = 16, 0xFF

GHCB_HV_FT_SNP, GHCB_HV_FT_SNP_AP_CREATION = 1 << 0, 1 << 1

# ---- sw_exit_code: exits of the processor that a guest passes on...
SVM_EXIT_READ_DR7, SVM_EXIT_WRITE_DR7 = 0x027, 0x037
SVM_EXIT_EXCP_BASE = 0x040
SVM_EXIT_RDTSC, SVM_EXIT_RDPMC = 0x06E, 0x06F
SVM_EXIT_CPUID, SVM_EXIT_INVD, SVM_EXIT_INVLPGA = 0x072, 0x076, 0x07A
SVM_EXIT_IOIO, SVM_EXIT_MSR = 0x07B, 0x07C
SVM_EXIT_VMRUN, SVM_EXIT_VMMCALL, SVM_EXIT_VMLOAD, SVM_EXIT_VMSAVE = 0x080, 0x081, 0x082, 0x083
SVM_EXIT_STGI, SVM_EXIT_CLGI, SVM_EXIT_SKINIT, SVM_EXIT_RDTSCP = 0x084, 0x085, 0x086, 0x087
SVM_EXIT_WBINVD, SVM_EXIT_MONITOR, SVM_EXIT_MWAIT = 0x089, 0x08A, 0x08B
SVM_EXIT_NPF = 0x400

# ... and events that only the GHCB knows
SVM_VMGEXIT_MMIO_READ, SVM_VMGEXIT_MMIO_WRITE = 0x80000001, 0x80000002
SVM_VMGEXIT_NMI_COMPLETE = 0x80000003
SVM_VMGEXIT_AP_HLT_LOOP = 0x80000004
SVM_VMGEXIT_AP_JUMP_TABLE = 0x80000005
SVM_VMGEXIT_SET_AP_JUMP_TABLE, SVM_VMGEXIT_GET_AP_JUMP_TABLE = 0, 1  # in sw_exit_info_1
SVM_VMGEXIT_PSC = 0x80000010
SVM_VMGEXIT_GUEST_REQUEST, SVM_VMGEXIT_EXT_GUEST_REQUEST = 0x80000011, 0x80000012
SVM_VMGEXIT_AP_CREATION = 0x80000013
SVM_VMGEXIT_HV_FEATURES = 0x8000FFFD
SVM_VMGEXIT_TERM_REQUEST = 0x8000FFFE
SVM_VMGEXIT_UNSUPPORTED_EVENT = 0x8000FFFF

# ---- sw_exit_info_1 of SVM_EXIT_IOIO
SVM_IOIO_TYPE_MASK, SVM_IOIO_STR_MASK, SVM_IOIO_REP_MASK = 1, 1 << 2, 1 << 3  # IN, INS or OUTS, with a prefix
SVM_IOIO_SIZE_SHIFT, SVM_IOIO_ASIZE_SHIFT = 4, 7
SVM_IOIO_SIZE_MASK, SVM_IOIO_ASIZE_MASK = 7 << SVM_IOIO_SIZE_SHIFT, 7 << SVM_IOIO_ASIZE_SHIFT
SVM_IOIO_SEG_SHIFT, SVM_IOIO_PORT_SHIFT = 10, 16

# ---- the hypervisor's answer: sw_exit_info_1, and what stands in sw_exit_info_2 then
GHCB_HV_RESP_NO_ACTION = 0  # done: the result, if there is one
GHCB_HV_RESP_ISSUE_EXCEPTION = 1  # raise this exception: an event as in EVENTINJ
GHCB_HV_RESP_MALFORMED_INPUT = 2  # one of:
GHCB_ERR_NOT_REGISTERED = 1
GHCB_ERR_INVALID_USAGE = 2
GHCB_ERR_INVALID_SCRATCH_AREA = 3
GHCB_ERR_MISSING_INPUT = 4
GHCB_ERR_INVALID_INPUT = 5
GHCB_ERR_INVALID_EVENT = 6
SVM_EVTINJ_TYPE_EXEPT, SVM_EVTINJ_VALID = 3 << 8, 1 << 31
