"""The VMSA: the page in which an SEV-ES guest's registers lie while its vCPU does not run.

LAUNCH_UPDATE_VMSA measures and encrypts it whole, so every byte counts, reserved ones too. The layout is the processor's
(AMD64 Architecture Programmer's Manual volume 2, table B-4) under the kernel's names (arch/x86/include/asm/svm.h, struct
sev_es_save_area; reserved fields are named after their offset). The kernel's struct ends at 0x670; here the rest of the
page belongs to it.
"""

from __future__ import annotations

from ctypes import Structure
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

VMSA_SIZE = 4096

# sev_features, as far as KVM lets user space choose them (KVM_SEV_INIT2's vmsa_features).
SVM_SEV_FEAT_SNP_ACTIVE = 1 << 0
SVM_SEV_FEAT_DEBUG_SWAP = 1 << 5
SVM_SEV_FEAT_SECURE_TSC = 1 << 9

# A segment's attributes: the descriptor's access byte, and above it its four flags.
SVM_SELECTOR_TYPE_MASK = 0xF
SVM_SELECTOR_S_SHIFT = 4
SVM_SELECTOR_DPL_SHIFT = 5
SVM_SELECTOR_P_SHIFT = 7
SVM_SELECTOR_AVL_SHIFT = 8
SVM_SELECTOR_L_SHIFT = 9
SVM_SELECTOR_DB_SHIFT = 10
SVM_SELECTOR_G_SHIFT = 11


class vmcb_seg(Structure):
    """A segment register or descriptor table; `limit` is in bytes."""

    _pack_ = 1
    _fields_ = [("selector", u16), ("attrib", u16), ("limit", u32), ("base", u64)]


SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr")


class sev_es_save_area(Structure):
    """One VMSA, 4096 bytes."""

    _pack_ = 1
    _fields_ = [
        *((name, vmcb_seg) for name in SEGMENTS),
        *((name, u64) for name in ("pl0_ssp", "pl1_ssp", "pl2_ssp", "pl3_ssp", "u_cet")),
        ("reserved_0xc8", u8 * 2),
        ("vmpl", u8),
        ("cpl", u8),
        ("reserved_0xcc", u8 * 4),
        ("efer", u64),
        ("reserved_0xd8", u8 * 104),
        *((name, u64) for name in ("xss", "cr4", "cr3", "cr0", "dr7", "dr6", "rflags", "rip")),
        *((f"dr{n}", u64) for n in range(4)),
        *((f"dr{n}_addr_mask", u64) for n in range(4)),
        ("reserved_0x1c0", u8 * 24),
        *((name, u64) for name in ("rsp", "s_cet", "ssp", "isst_addr", "rax")),
        *((name, u64) for name in ("star", "lstar", "cstar", "sfmask", "kernel_gs_base")),
        *((name, u64) for name in ("sysenter_cs", "sysenter_esp", "sysenter_eip", "cr2")),
        ("reserved_0x248", u8 * 32),
        *((name, u64) for name in ("g_pat", "dbgctl", "br_from", "br_to", "last_excp_from", "last_excp_to")),
        ("reserved_0x298", u8 * 80),
        ("pkru", u32),
        ("tsc_aux", u32),
        ("tsc_scale", u64),
        ("tsc_offset", u64),
        ("reserved_0x300", u8 * 8),
        ("rcx", u64),
        ("rdx", u64),
        ("rbx", u64),
        ("reserved_0x320", u64),  # RSP's place in the register numbering; it stands at 0x1d8
        *((name, u64) for name in ("rbp", "rsi", "rdi")),
        *((f"r{n}", u64) for n in range(8, 16)),
        ("reserved_0x380", u8 * 16),
        *((name, u64) for name in ("guest_exit_info_1", "guest_exit_info_2", "guest_exit_int_info", "guest_nrip")),
        *((name, u64) for name in ("sev_features", "vintr_ctrl", "guest_exit_code", "virtual_tom")),
        *((name, u64) for name in ("tlb_id", "pcpu_id", "event_inj", "xcr0")),
        ("reserved_0x3f0", u8 * 16),
        ("x87_dp", u64),
        ("mxcsr", u32),
        *((name, u16) for name in ("x87_ftw", "x87_fsw", "x87_fcw", "x87_fop", "x87_ds", "x87_cs")),
        ("x87_rip", u64),
        ("fpreg_x87", u8 * 80),  # bits 63:0 of the eight registers, then their bits 79:64
        ("fpreg_xmm", u8 * 256),
        ("fpreg_ymm", u8 * 256),
        ("reserved_0x670", u8 * (VMSA_SIZE - 0x670)),
    ]
