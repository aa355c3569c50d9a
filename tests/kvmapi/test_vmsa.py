"""VMSA pages against sev-snp-measure, an independent implementation: its own classes give the bytes to expect.

Segments come as the descriptors of a GDT. The expected attributes are read off the descriptor, not off `kvm_segment`.
"""

from __future__ import annotations

import hashlib
import struct
from ctypes import c_uint8, sizeof
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevsnpmeasure.vmm_types import VMMType
from sevsnpmeasure.vmsa import VMSA, SevEsSaveArea, VmcbSeg

from kvmapi.abi import vmsa as abi
from kvmapi.abi.vcpu import kvm_regs, kvm_segment, kvm_sregs
from kvmapi.vmsa import MSRS, build_vmsa, difference, fields, reset_registers, sregs_as_read

BSP, AP = 0xFFFFFFF0, 0x0080B004
EPYC = 0x800F12
OTHER_NAMES = {f"vmpl{n}_ssp": f"pl{n}_ssp" for n in range(4)} | {
    "dbgctrl": "dbgctl", "reserved_0x2f0": "tsc_scale", "manual_padding": "reserved_0x670"
}  # fmt: skip
CODE64, DATA64, TSS64 = 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00008B0C00000067
USER_DATA = 0x00CFF3000000FFFF
GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{n}" for n in range(8, 16)))


def from_descriptor(selector: int, descriptor: int) -> tuple[kvm_segment, VmcbSeg]:
    """A segment loaded from a GDT entry: as KVM takes it, and as the oracle writes it."""
    access, nibble = descriptor >> 40 & 0xFF, descriptor >> 52 & 0xF
    base = descriptor >> 16 & 0xFFFFFF | descriptor >> 56 << 24
    limit = descriptor & 0xFFFF | (descriptor >> 48 & 0xF) << 16
    limit = limit << 12 | 0xFFF if nibble & 8 else limit
    ours = kvm_segment(
        base=base, limit=limit, selector=selector, type=access & 15, s=access >> 4 & 1, dpl=access >> 5 & 3, present=access >> 7,
        avl=nibble & 1, l=nibble >> 1 & 1, db=nibble >> 2 & 1, g=nibble >> 3,
    )  # fmt: skip
    return ours, VmcbSeg(selector, access | nibble << 8, limit, base)


def as_qemu_resets(eip: int) -> tuple[kvm_regs, kvm_sregs]:
    """The registers that QEMU sets before the launch."""
    regs, sregs = reset_registers()
    for name in ("es", "ds", "fs", "gs", "ss"):
        getattr(sregs, name).type = 3
    sregs.cs.type, sregs.cs.base, sregs.tr.type = 11, eip & 0xFFFF0000, 11
    regs.rip = eip & 0xFFFF
    return regs, sregs


def long_mode() -> tuple[kvm_regs, kvm_sregs, dict[str, Any]]:
    """A vCPU set up for 64-bit code, and the oracle's fields for it."""
    regs = kvm_regs(rip=0x100000, rflags=0x202, **{name: 0x1111 * at for at, name in enumerate(GENERAL, 1)})
    sregs = kvm_sregs(cr0=0x80050033, cr2=0xDEAD000, cr3=1 << 51 | 0x8000, cr4=0x620, cr8=3, efer=0xD01, apic_base=0xFEE00900)
    expected: dict[str, Any] = {name: getattr(regs, name) for name in (*GENERAL, "rip", "rflags")}
    loaded = {"cs": (8, CODE64), "tr": (0x18, TSS64), "ldt": (0, 0x0000820000000000)}
    loaded |= dict.fromkeys(("ds", "es", "ss"), (0x10, DATA64)) | dict.fromkeys(("fs", "gs"), (0x23, USER_DATA))
    for name, (selector, descriptor) in loaded.items():
        ours, theirs = from_descriptor(selector, descriptor)
        setattr(sregs, name, ours)
        expected["ldtr" if name == "ldt" else name] = theirs
    sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit = 0x1000, 0x27, 0x2000, 0xFFF
    expected |= {
        "gdtr": VmcbSeg(0, 0, 0x27, 0x1000), "idtr": VmcbSeg(0, 0, 0xFFF, 0x2000), "efer": 0x1D01, "cr0": 0x80050033, "cr4": 0x660,
        "cr3": 1 << 51 | 0x8000, "dr6": 0xFFFF0FF0, "dr7": 0x400, "g_pat": 0x0007040600070406, "xcr0": 1, "mxcsr": 0x1F80, "x87_fcw": 0x37F,
    }  # fmt: skip
    return regs, sregs, expected


def test_the_layout_is_the_oracles() -> None:
    ours = abi.sev_es_save_area
    assert sizeof(ours) == sizeof(SevEsSaveArea) == abi.VMSA_SIZE
    for name, *_ in SevEsSaveArea._fields_:
        mine = getattr(ours, OTHER_NAMES.get(name, name))
        assert mine.offset == getattr(SevEsSaveArea, name).offset, name
    assert ours.tsc_offset.offset == 0x2F8 and ours.sev_features.offset == 0x3B0 and ours.fpreg_ymm.offset == 0x570


@pytest.mark.parametrize("eip", [BSP, AP], ids=["bsp", "ap"])
@pytest.mark.parametrize("features", [0, abi.SVM_SEV_FEAT_DEBUG_SWAP])
def test_reset_as_qemu_does_it(eip: int, features: int) -> None:
    regs, sregs = as_qemu_resets(eip)
    regs.rdx = EPYC
    page = build_vmsa(regs, sregs, sev_features=features)
    assert page == bytes(VMSA.build_save_area(eip, features, EPYC))


def test_the_published_page() -> None:
    regs, sregs = as_qemu_resets(BSP)
    regs.rdx = EPYC
    assert hashlib.sha256(build_vmsa(regs, sregs)).hexdigest() == "8295cef559b57130391d59605890ef93297720b48bef9a8c3c985b9c3fb0788c"


def test_registers_read_and_set_again_as_another_vmm_does_it() -> None:
    """KVM_GET_SREGS and KVM_SET_SREGS leave the marks that the oracle knows of EC2: DS accessed, SS not."""
    regs, sregs = reset_registers()
    page = build_vmsa(regs, sregs_as_read(sregs), init2=False)
    assert page == bytes(VMSA.build_save_area(BSP, 0, EPYC, VMMType.ec2))


def test_a_vcpu_that_nobody_touched() -> None:
    regs, sregs = reset_registers()
    expected = VMSA.build_save_area(BSP, 0, EPYC, VMMType.ec2)
    for name in ("es", "ds", "fs", "gs"):
        getattr(expected, name).attrib = 0x92
    assert build_vmsa(regs, sregs, init2=False) == bytes(expected)


@pytest.mark.parametrize("pat", [{"pat": 0x00070106}, {"msrs": {0x277: 0x00070106}}], ids=["keyword", "msr"])
def test_another_pat(pat: dict[str, Any]) -> None:
    regs, sregs = as_qemu_resets(AP)
    assert build_vmsa(regs, sregs, init2=False, **pat) == bytes(VMSA.build_save_area(AP, 0, EPYC, VMMType.gce))


def test_long_mode() -> None:
    regs, sregs, expected = long_mode()
    page = build_vmsa(regs, sregs)
    assert difference(page, bytes(SevEsSaveArea(**expected))) is None
    assert page == bytes(SevEsSaveArea(**expected))


def test_code_of_ring_3_has_a_cpl() -> None:
    regs, sregs, expected = long_mode()
    sregs.ss, expected["ss"] = from_descriptor(0x23, USER_DATA)
    assert build_vmsa(regs, sregs) == bytes(SevEsSaveArea(**expected, cpl=3))


def test_what_is_unusable_is_not_present() -> None:
    regs, sregs, expected = long_mode()
    sregs.fs.unusable = 1
    expected["fs"].attrib &= ~0x80
    assert build_vmsa(regs, sregs) == bytes(SevEsSaveArea(**expected))


def test_granularity_is_what_was_set_whatever_the_limit() -> None:
    regs, sregs, expected = long_mode()
    sregs.ds.limit, sregs.es.g = 0xFFFF, 0
    expected["ds"].limit, expected["es"].attrib = 0xFFFF, 0x493
    assert build_vmsa(regs, sregs) == bytes(SevEsSaveArea(**expected))


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"cr0": 0xE0050033}, "cr0", 0x80050033),
        ({"cr0": 0x60000010}, "cr0", 0x10),
        ({"cr4": 0x66}, "cr4", 0x66),
        ({"cr4": 0x20}, "cr4", 0x60),
        ({"efer": 0}, "efer", 0x1000),
        ({"cr3": 0x1234000}, "cr3", 0x1234000),
    ],
)
def test_control_registers(change: dict[str, int], field: str, value: int) -> None:
    regs, sregs, expected = long_mode()
    for name, new in change.items():
        setattr(sregs, name, new)
    assert build_vmsa(regs, sregs) == bytes(SevEsSaveArea(**expected | {field: value}))


def test_what_kvm_keeps_elsewhere_does_not_get_in() -> None:
    regs, sregs, expected = long_mode()
    sregs.cr2, sregs.cr8, sregs.apic_base, sregs.interrupt_bitmap[0] = 0x1234, 15, 0xFEE00000, 1
    assert build_vmsa(regs, sregs) == bytes(SevEsSaveArea(**expected))


def test_rflags_always_has_its_one() -> None:
    regs, sregs, expected = long_mode()
    regs.rflags = 0x10
    assert build_vmsa(regs, sregs) == bytes(SevEsSaveArea(**expected | {"rflags": 0x12}))


@pytest.mark.parametrize(
    ("number", "value", "field", "kept"),
    [
        (0x174, 0x8, "sysenter_cs", 0x8),
        (0x175, 0x1_2345_6789, "sysenter_esp", 0x2345_6789),
        (0x176, 0x1_8765_4321, "sysenter_eip", 0x8765_4321),
        (0x1D9, 3, "dbgctrl", 1),
        (0x1DB, 11, "br_from", 11),
        (0x1DC, 12, "br_to", 12),
        (0x1DD, 13, "last_excp_from", 13),
        (0x1DE, 14, "last_excp_to", 14),
        (0x277, 0x0606060606060606, "g_pat", 0x0606060606060606),
        (0x6A2, 5, "s_cet", 5),
        (0x6A8, 0x7000, "isst_addr", 0x7000),
        (0xC0000081, 0x23001000000000, "star", 0x23001000000000),
        (0xC0000082, 0x101000, "lstar", 0x101000),
        (0xC0000083, 0x102000, "cstar", 0x102000),
        (0xC0000084, 0x700, "sfmask", 0x700),
        (0xC0000102, 0x103000, "kernel_gs_base", 0x103000),
    ],
)
def test_msrs(number: int, value: int, field: str, kept: int) -> None:
    regs, sregs, expected = long_mode()
    assert number in MSRS
    assert build_vmsa(regs, sregs, msrs={number: value}) == bytes(SevEsSaveArea(**expected | {field: kept}))


@pytest.mark.parametrize(
    ("keyword", "field", "value"),
    [("xcr0", "xcr0", 7), ("xss", "xss", 0x800), ("pkru", "pkru", 4), ("dr6", "dr6", 0xFFFF0FF1), ("dr7", "dr7", 0)],
)
def test_other_registers(keyword: str, field: str, value: int) -> None:
    regs, sregs, expected = long_mode()
    assert build_vmsa(regs, sregs, **{keyword: value}) == bytes(SevEsSaveArea(**expected | {field: value}))  # type: ignore[arg-type]


# ---- x87, SSE, AVX
def xsave_image(components: int) -> bytes:
    """An XSAVE image with everything in it, of which the header has `components`."""
    head = struct.pack("<HHBxHQQII", 0x27F, 0x3800, 0x81, 0x5D9, 0x1234567890, 0x2345678901, 0x9F80, 0xFFFF)
    x87 = b"".join(bytes([0x10 + n]) * 10 + bytes(6) for n in range(8))
    xmm = b"".join(bytes([0x40 + n]) * 16 for n in range(16))
    ymm = b"".join(bytes([0x80 + n]) * 16 for n in range(16))
    return (head + x87 + xmm).ljust(512, b"\0") + struct.pack("<Q", components).ljust(64, b"\0") + ymm


def floating(components: int) -> dict[str, Any]:
    """The oracle's fields for it."""
    low, high = b"".join(bytes([0x10 + n]) * 8 for n in range(8)), b"".join(bytes([0x10 + n]) * 2 for n in range(8))
    found: dict[str, Any] = {"mxcsr": 0x9F80 if components & 7 else 0x1F80}
    if components & 1:
        found |= {"x87_fcw": 0x27F, "x87_fsw": 0x3800, "x87_ftw": 0x81, "x87_fop": 0x5D9, "x87_rip": 0x1234567890, "x87_dp": 0x2345678901}
        found["fpreg_x87"] = (c_uint8 * 80)(*low, *high)
    if components & 2:
        found["fpreg_xmm"] = (c_uint8 * 256)(*(0x40 + n // 16 for n in range(256)))
    if components & 4:
        found["fpreg_ymm"] = (c_uint8 * 256)(*(0x80 + n // 16 for n in range(256)))
    return found


@pytest.mark.parametrize("components", range(8))
def test_floating_point(components: int) -> None:
    regs, sregs, expected = long_mode()
    page = build_vmsa(regs, sregs, xsave_image(components), xcr0=7)
    assert page == bytes(SevEsSaveArea(**expected | floating(components) | {"xcr0": 7}))


def test_the_legacy_type_has_no_floating_point() -> None:
    regs, sregs, expected = long_mode()
    del expected["mxcsr"], expected["x87_fcw"]
    assert build_vmsa(regs, sregs, xsave_image(7), init2=False) == bytes(SevEsSaveArea(**expected))


# ---- what KVM_GET_SREGS makes of segments
@pytest.mark.parametrize(
    ("name", "given", "shown"),
    [
        ("cs", {"type": 10, "g": 1, "limit": 0xFFFFF}, {"type": 10, "g": 0, "limit": 0xFFFFF}),
        ("cs", {"type": 11, "g": 0, "limit": 0x100000}, {"type": 11, "g": 1, "limit": 0x100000}),
        ("ds", {"type": 2}, {"type": 3}),
        ("es", {"type": 2, "unusable": 1}, {"type": 2, "present": 0, "unusable": 1}),
        ("fs", {"type": 2, "present": 0}, {"type": 2, "present": 0, "unusable": 1}),
        ("gs", {"type": 0x13, "present": 0x81, "dpl": 7, "db": 2, "l": 3}, {"type": 3, "present": 1, "dpl": 3, "db": 0, "l": 1}),
        ("gs", {"type": 2, "present": 0x80}, {"type": 2, "present": 0, "unusable": 1}),
        ("ss", {"type": 2, "db": 1}, {"type": 2, "db": 1}),
        ("ss", {"type": 2, "db": 1, "present": 0}, {"type": 2, "db": 0, "present": 0, "unusable": 1}),
        ("tr", {"type": 9, "unusable": 1}, {"type": 11, "present": 0, "unusable": 1}),
        (
            "ldt",
            {"type": 2, "selector": 0x28, "base": 1 << 40, "dpl": 3, "avl": 1},
            {"type": 2, "selector": 0x28, "base": 1 << 40, "dpl": 3, "avl": 1},
        ),
    ],
)
def test_segments_as_read(name: str, given: dict[str, int], shown: dict[str, int]) -> None:
    sregs = kvm_sregs(cr0=0x11, cr2=5)
    setattr(sregs, name, kvm_segment(**{"present": 1, **given}))
    found = sregs_as_read(sregs)
    assert bytes(getattr(found, name)) == bytes(kvm_segment(**{"present": 1, **shown}))
    assert (found.cr0, found.cr2) == (0x11, 5)
    assert getattr(sregs, name).type == given["type"], "what was given stays as it was"


# ---- refusals
@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"dr7": 0x401}, "DR7 is 0x401"),
        ({"sev_features": 0x20, "init2": False}, "KVM_SEV_ES_INIT takes none"),
        ({"msrs": {0xC0000080: 0x500}}, "MSR 0xc0000080 has no place"),
        ({"msrs": {0xC0000103: 1}}, "MSR 0xc0000103 has no place"),
        ({"xsave": bytes(575)}, "at least 576 bytes, this one 575"),
    ],
)
def test_refusals(keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_vmsa(*reset_registers(), **keywords)


# ---- fields and differences
def test_fields_by_name() -> None:
    regs, sregs, _ = long_mode()
    found = fields(build_vmsa(regs, sregs, xsave_image(7)))
    assert {name: found[name] for name in ("cs.attrib", "cs.limit", "tr.selector", "rip", "r15", "efer", "xcr0", "mxcsr")} == {
        "cs.attrib": 0xA9B, "cs.limit": 0xFFFFFFFF, "tr.selector": 0x18, "rip": 0x100000, "r15": 0x1111 * 16, "efer": 0x1D01, "xcr0": 1,
        "mxcsr": 0x9F80,
    }  # fmt: skip
    assert found["st3"] == int.from_bytes(b"\x13" * 10, "little") and found["xmm15"] == int.from_bytes(b"\x4f" * 16, "little")
    assert found["ymm0_high"] == int.from_bytes(b"\x80" * 16, "little")
    assert "cr2" not in found and "gdtr.selector" not in found
    assert list(found)[:2] == ["es.selector", "es.attrib"]
    assert fields(bytes(4096)) == {}


def test_a_reserved_byte_is_a_field() -> None:
    page = bytearray(build_vmsa(*reset_registers()))
    page[0x2E0] = 7
    assert fields(bytes(page))["byte_0x2e0"] == 7
    assert difference(build_vmsa(*reset_registers()), bytes(page)) == ("byte_0x2e0", 0, 7)


def test_the_first_difference_counts() -> None:
    regs, sregs, _ = long_mode()
    one = build_vmsa(regs, sregs)
    regs.rip, sregs.ds.selector = 0x100010, 0x30
    assert difference(one, build_vmsa(regs, sregs)) == ("ds.selector", 0x10, 0x30)
    assert difference(one, one) is None


@given(st.integers(0, 4095), st.integers(1, 255))
def test_no_byte_escapes(at: int, change: int) -> None:
    """Whatever byte differs, the difference has a name, and its values are numbers, not dumps."""
    regs, sregs, _ = long_mode()
    one = build_vmsa(regs, sregs, xsave_image(7))
    other = bytearray(one)
    other[at] ^= change
    found = difference(one, bytes(other))
    assert found is not None and isinstance(found[0], str) and found[1] != found[2]
    assert fields(bytes(other)).get(found[0], 0) == found[2]


@pytest.mark.parametrize("size", [0, 4095, 4097])
def test_a_page_is_a_page(size: int) -> None:
    with pytest.raises(ValueError, match=f"a VMSA has 4096 bytes, this has {size}"):
        fields(bytes(size))
