"""The VMSA that KVM launches an SEV-ES vCPU with, as pure functions: for the owner, who predicts its measurement, and for
the model, which makes it.

    page = build_vmsa(regs, sregs)          what LAUNCH_UPDATE_VMSA measures for a vCPU set up with these
    fields(page)                            what in it is not zero, by name
    difference(predicted, page)             the first field in which two pages differ

`regs` and `sregs` are what was given to KVM_SET_REGS and KVM_SET_SREGS; of a vCPU that user space has not touched,
`reset_registers()`. KVM does not take them over as they are (7.3, arch/x86/kvm/svm): EFER gets SVME, CR4 the host's MCE,
CR0 loses CD and NW, SS.DPL is the CPL, and CR2, DR0-DR3 and TSC_AUX never get there. G is what was set, not what the
limit says, and a data segment is only "accessed" if it was set so: KVM_GET_SREGS shows both otherwise (`sregs_as_read`).

The x87, SSE and AVX part is filled in for VMs of type 3 only (KVM_SEV_INIT2); the legacy KVM_SEV_ES_INIT leaves it zero.

Out of reach: an EFER.LME that was set while CR0.PG was being cleared by one KVM_SET_SREGS (KVM then leaves LME out),
SPEC_CTRL on processors that virtualise it, and CD and NW where the VMM disabled KVM_X86_QUIRK_CD_NW_CLEARED.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from ctypes import Array, sizeof

from kvmapi.abi import vmsa as abi
from kvmapi.abi.vcpu import GENERAL_REGISTERS, kvm_regs, kvm_segment, kvm_sregs
from kvmapi.abi.vmsa import VMSA_SIZE, sev_es_save_area, vmcb_seg

DR6_RESET, DR7_RESET = 0xFFFF0FF0, 0x400
PAT_RESET = 0x0007040600070406
RDX_RESET = 0x600  # EDX of a processor whose CPUID nobody has set yet
_CR0_NW, _CR0_CD = 1 << 29, 1 << 30
_CR4_MCE, _EFER_SVME = 1 << 6, 1 << 12
_DEBUGCTL_BTF = 1 << 1
_XFEATURE_X87, _XFEATURE_SSE, _XFEATURE_YMM = 1, 2, 4
_XSTATE_BV_AT, _YMM_AT = 512, 576  # in an XSAVE image of standard format
_FXSAVE = struct.Struct("<HHHHQQI")  # fcw fsw ftw fop rip rdp mxcsr
_FXSAVE_RESET = (0x37F, 0, 0, 0, 0, 0, 0x1F80)

_MSRS: dict[int, tuple[str, int]] = {
    0x174: ("sysenter_cs", 0xFFFFFFFFFFFFFFFF),
    0x175: ("sysenter_esp", 0xFFFFFFFF),
    0x176: ("sysenter_eip", 0xFFFFFFFF),
    0x1D9: ("dbgctl", ~_DEBUGCTL_BTF & 0xFFFFFFFFFFFFFFFF),
    0x1DB: ("br_from", 0xFFFFFFFFFFFFFFFF),
    0x1DC: ("br_to", 0xFFFFFFFFFFFFFFFF),
    0x1DD: ("last_excp_from", 0xFFFFFFFFFFFFFFFF),
    0x1DE: ("last_excp_to", 0xFFFFFFFFFFFFFFFF),
    0x277: ("g_pat", 0xFFFFFFFFFFFFFFFF),
    0x6A2: ("s_cet", 0xFFFFFFFFFFFFFFFF),
    0x6A8: ("isst_addr", 0xFFFFFFFFFFFFFFFF),
    0xC0000081: ("star", 0xFFFFFFFFFFFFFFFF),
    0xC0000082: ("lstar", 0xFFFFFFFFFFFFFFFF),
    0xC0000083: ("cstar", 0xFFFFFFFFFFFFFFFF),
    0xC0000084: ("sfmask", 0xFFFFFFFFFFFFFFFF),
    0xC0000102: ("kernel_gs_base", 0xFFFFFFFFFFFFFFFF),
}
"""MSR -> its field, and the bits of it that KVM keeps."""

MSRS = tuple(_MSRS)
"""The MSRs that a VMSA holds under a field of their own; EFER and the segment bases come with `sregs`."""


def build_vmsa(
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: bytes | None = None,
    *,
    init2: bool = True,
    sev_features: int = 0,
    xcr0: int = 1,
    xss: int = 0,
    pkru: int = 0,
    dr6: int = DR6_RESET,
    dr7: int = DR7_RESET,
    pat: int = PAT_RESET,
    msrs: Mapping[int, int] | None = None,
) -> bytes:
    """The 4096 bytes that LAUNCH_UPDATE_VMSA measures for a vCPU with these registers.

    `xsave`: an image as KVM_GET_XSAVE gives it or KVM_SET_XSAVE took it; None is the state after reset. `init2`: a VM of type
    3; the legacy type 0 has no x87, SSE and AVX state and no `sev_features`. `msrs`: those of `MSRS` that were set. ValueError for
    what KVM launches no vCPU with: a DR7 that breaks, an MSR that has no place in a VMSA, features of a legacy VM.

    >>> regs, sregs = reset_registers()
    >>> hex(fields(build_vmsa(regs, sregs))["cs.base"])
    '0xffff0000'
    """
    if dr7 & ~DR7_RESET:
        raise ValueError(f"DR7 is {dr7:#x}: KVM does not launch a vCPU with breakpoints; leave it at {DR7_RESET:#x}")
    if sev_features and not init2:
        raise ValueError(f"VMSA features {sev_features:#x}: KVM_SEV_ES_INIT takes none; use KVM_SEV_INIT2")
    area = sev_es_save_area()
    _segments(area, sregs)
    area.efer = sregs.efer | _EFER_SVME
    area.cr4 = sregs.cr4 | _CR4_MCE
    area.cr3 = sregs.cr3
    area.cr0 = sregs.cr0 & ~(_CR0_CD | _CR0_NW)
    for name in GENERAL_REGISTERS:
        setattr(area, name, getattr(regs, name))
    area.rflags |= 2
    area.xcr0, area.xss, area.pkru = xcr0, xss, pkru
    area.dr6, area.dr7, area.g_pat = dr6, dr7, pat
    area.sev_features = sev_features
    for number, value in (msrs or {}).items():
        if number not in _MSRS:
            raise ValueError(f"MSR {number:#x} has no place of its own in a VMSA; EFER and segment bases belong into sregs")
        name, kept = _MSRS[number]
        setattr(area, name, value & kept)
    if init2:
        _floating_point(area, xsave)
    return bytes(area)


def _segments(area: sev_es_save_area, sregs: kvm_sregs) -> None:
    for name in ("es", "cs", "ss", "ds", "fs", "gs", "tr"):
        setattr(area, name, _segment(getattr(sregs, name)))
    area.ldtr = _segment(sregs.ldt)
    for name, table in (("gdtr", sregs.gdt), ("idtr", sregs.idt)):
        setattr(area, name, vmcb_seg(0, 0, table.limit, table.base))
    area.cpl = sregs.ss.dpl & 3


def _segment(segment: kvm_segment) -> vmcb_seg:
    """kvm_segment in the VMCB's form; one that is unusable is not present."""
    attrib = segment.type & abi.SVM_SELECTOR_TYPE_MASK
    attrib |= (segment.s & 1) << abi.SVM_SELECTOR_S_SHIFT
    attrib |= (segment.dpl & 3) << abi.SVM_SELECTOR_DPL_SHIFT
    attrib |= (segment.present & 1 and not segment.unusable) << abi.SVM_SELECTOR_P_SHIFT
    attrib |= (segment.avl & 1) << abi.SVM_SELECTOR_AVL_SHIFT
    attrib |= (segment.l & 1) << abi.SVM_SELECTOR_L_SHIFT
    attrib |= (segment.db & 1) << abi.SVM_SELECTOR_DB_SHIFT
    attrib |= (segment.g & 1) << abi.SVM_SELECTOR_G_SHIFT
    return vmcb_seg(segment.selector, attrib, segment.limit, segment.base)


def _floating_point(area: sev_es_save_area, xsave: bytes | None) -> None:
    head, registers, xmm, ymm = _FXSAVE_RESET, bytes(128), bytes(256), bytes(256)
    if xsave is not None:
        if len(xsave) < _YMM_AT:
            raise ValueError(f"an XSAVE image has at least {_YMM_AT} bytes, this one {len(xsave)}")
        components = struct.unpack_from("<Q", xsave, _XSTATE_BV_AT)[0]
        given = _FXSAVE.unpack_from(xsave)
        if components & _XFEATURE_X87:
            head, registers = given, xsave[32:160]
        elif components & (_XFEATURE_SSE | _XFEATURE_YMM):
            head = (*head[:6], given[6])  # MXCSR belongs to all three
        if components & _XFEATURE_SSE:
            xmm = xsave[160:416]
        if components & _XFEATURE_YMM:
            ymm = xsave[_YMM_AT : _YMM_AT + 256].ljust(256, b"\0")
    area.x87_fcw, area.x87_fsw, area.x87_ftw, area.x87_fop, area.x87_rip, area.x87_dp, area.mxcsr = head
    low = b"".join(registers[at : at + 8] for at in range(0, 128, 16))
    high = b"".join(registers[at + 8 : at + 10] for at in range(0, 128, 16))
    area.fpreg_x87[:] = low + high
    area.fpreg_xmm[:] = xmm
    area.fpreg_ymm[:] = ymm


# ---- registers after reset
def reset_registers() -> tuple[kvm_regs, kvm_sregs]:
    """General and system registers of a new vCPU as KVM holds them, for the fields that a VMSA has."""
    regs = kvm_regs(rip=0xFFF0, rflags=2, rdx=RDX_RESET)
    sregs = kvm_sregs(cr0=0x60000010)
    for name in ("es", "ss", "ds", "fs", "gs"):
        setattr(sregs, name, kvm_segment(limit=0xFFFF, type=2, present=1, s=1))
    sregs.cs = kvm_segment(base=0xFFFF0000, limit=0xFFFF, selector=0xF000, type=0xA, present=1, s=1)
    sregs.ldt = kvm_segment(limit=0xFFFF, type=2, present=1)
    sregs.tr = kvm_segment(limit=0xFFFF, type=3, present=1)
    sregs.gdt.limit = sregs.idt.limit = 0xFFFF
    return regs, sregs


def sregs_as_read(sregs: kvm_sregs) -> kvm_sregs:
    """What KVM_GET_SREGS of kvm_amd makes of these: G follows the limit, a data segment that is there was accessed, the task
    register is busy, and what is not present is unusable. Who reads, changes and sets system registers sets these.
    """
    shown = kvm_sregs.from_buffer_copy(sregs)
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"):
        segment: kvm_segment = getattr(shown, name)
        for field, bits in (("type", 15), ("s", 1), ("dpl", 3), ("avl", 1), ("l", 1), ("db", 1)):
            setattr(segment, field, getattr(segment, field) & bits)
        segment.present = segment.present & 1 and not segment.unusable
        segment.unusable = 1 - segment.present
        segment.g = int(segment.limit > 0xFFFFF)
        if name == "tr":
            segment.type |= 2
        elif name in ("ds", "es", "fs", "gs"):
            segment.type |= segment.present
        elif name == "ss" and not segment.present:
            segment.db = 0
    return shown


# ---- looking at VMSAs
def fields(page: bytes) -> dict[str, int]:
    """What in a VMSA is not zero: name -> value, in the order of the page.

    Parts have names of their own: `cs.attrib`, `st0` (80 bits), `xmm3`, `ymm3_high` (128 bits each), and `byte_0x2e0` for
    a byte of a reserved area. ValueError for anything but 4096 bytes.
    """
    return {name: value for name, value in _all_fields(page).items() if value}


def difference(a: bytes, b: bytes) -> tuple[str, int, int] | None:
    """The first field in which two VMSAs differ, and its value in each; None when they are the same."""
    ours, theirs = _all_fields(a), _all_fields(b)
    return next(((name, value, theirs[name]) for name, value in ours.items() if value != theirs[name]), None)


def _all_fields(page: bytes) -> dict[str, int]:
    if len(page) != VMSA_SIZE:
        raise ValueError(f"a VMSA has {VMSA_SIZE} bytes, this has {len(page)}")
    area = sev_es_save_area.from_buffer_copy(page)
    found: dict[str, int] = {}
    for name, kind in ((row[0], row[1]) for row in sev_es_save_area._fields_):
        value = getattr(area, name)
        if isinstance(value, vmcb_seg):
            found |= {f"{name}.{part[0]}": getattr(value, part[0]) for part in vmcb_seg._fields_}
        elif not isinstance(value, Array):
            found[name] = value
        elif name == "fpreg_x87":
            found |= _x87_registers(bytes(value))
        elif name in ("fpreg_xmm", "fpreg_ymm"):
            title = "xmm{}" if name == "fpreg_xmm" else "ymm{}_high"
            found |= {title.format(n): int.from_bytes(bytes(value[16 * n : 16 * n + 16]), "little") for n in range(16)}
        else:
            start = getattr(sev_es_save_area, name).offset
            found |= {f"byte_{start + at:#x}": value[at] for at in range(sizeof(kind))}
    return found


def _x87_registers(data: bytes) -> dict[str, int]:
    return {f"st{n}": int.from_bytes(data[8 * n : 8 * n + 8] + data[64 + 2 * n : 66 + 2 * n], "little") for n in range(8)}
