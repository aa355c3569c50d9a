"""What control and debug registers, EFER and XCR0 take from a guest, and what is #GP or #UD instead.

In PAE mode MOV to CR0, CR3 and CR4 load the four page-directory-pointer entries, and refuse reserved bits in them.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kvmapi.exits import Hlt, Shutdown
from tests.conformance.protected import ProtectedGuest
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, PML4, LongGuest, code
from tests.conformance.test_rings import RingGuest, lack

REGISTERS = [
    ("CR0: PG without PE", code("0f20c024 fe0f22c0", "mov rax, cr0; and al, 0xfe; mov cr0, rax"), 13),
    ("CR0: NW without CD", code("0f20c048 0fbae81d 0f22c0", "mov rax, cr0; bts rax, 29; mov cr0, rax"), 13),
    ("CR0: bit 32", code("0f20c048 0fbae820 0f22c0", "mov rax, cr0; bts rax, 32; mov cr0, rax"), 13),
    ("CR0: paging off in 64-bit mode", code("0f20c048 0fbaf01f 0f22c0", "mov rax, cr0; btr rax, 31; mov cr0, rax"), 13),
    ("CR3: bit 52", code("0f20d848 0fbae834 0f22d8", "mov rax, cr3; bts rax, 52; mov cr3, rax"), 13),
    ("CR3: bit 63", code("0f20d848 0fbae83f 0f22d8", "mov rax, cr3; bts rax, 63; mov cr3, rax"), 13),
    ("CR4: PAE off", code("0f20e048 0fbaf005 0f22e0", "mov rax, cr4; btr rax, 5; mov cr4, rax"), 13),
    ("CR4: bit 31", code("0f20e048 0fbae81f 0f22e0", "mov rax, cr4; bts rax, 31; mov cr4, rax"), 13),
    ("CR4: VMXE", code("0f20e048 0fbae80d 0f22e0", "mov rax, cr4; bts rax, 13; mov cr4, rax"), 13),
    ("CR8: 16", code("b8100000 00440f22 c0", "mov eax, 16; mov cr8, rax"), 13),
    ("CR1", code("0f20c8", ".byte 0x0f, 0x20, 0xc8"), 6),
    ("CR5", code("0f22e8", ".byte 0x0f, 0x22, 0xe8"), 6),
    ("DR6: bit 32", code("0f21f048 0fbae820 0f23f0", "mov rax, dr6; bts rax, 32; mov dr6, rax"), 13),
    ("DR7: bit 32", code("0f21f848 0fbae820 0f23f8", "mov rax, dr7; bts rax, 32; mov dr7, rax"), 13),
    ("DR4 with CR4.DE", code("0f20e00c 080f22e0 0f23e0", "mov rax, cr4; or al, 8; mov cr4, rax; mov dr4, rax"), 6),
    ("DR5 with CR4.DE", code("0f20e00c 080f22e0 0f21e8", "mov rax, cr4; or al, 8; mov cr4, rax; mov rax, dr5"), 6),
    ("EFER: a reserved bit", code("b9800000 c00f320f bae8090f 30", "mov ecx, 0xc0000080; rdmsr; bts eax, 9; wrmsr"), 13),
    ("EFER: LME off while paging", code("b9800000 c00f320f baf0080f 30", "mov ecx, 0xc0000080; rdmsr; btr eax, 8; wrmsr"), 13),
    ("XSETBV without CR4.OSXSAVE", code("31c931d2 b8030000 000f01d1", "xor ecx, ecx; xor edx, edx; mov eax, 3; xsetbv"), 6),
    (
        "XCR0 without x87",
        code(
            "0f20e00f bae8120f 22e031c9 31d2b802 0000000f 01d1",
            "mov rax, cr4; bts eax, 18; mov cr4, rax; xor ecx, ecx; xor edx, edx; mov eax, 2; xsetbv",
        ),
        13,
    ),
    (
        "XCR1",
        code(
            "0f20e00f bae8120f 22e0b901 00000031 d2b80300 00000f01 d1",
            "mov rax, cr4; bts eax, 18; mov cr4, rax; mov ecx, 1; xor edx, edx; mov eax, 3; xsetbv",
        ),
        13,
    ),
    (
        "XCR0: a reserved bit",
        code(
            "0f20e00f bae8120f 22e031c9 ba010000 00b80300 00000f01 d1",
            "mov rax, cr4; bts eax, 18; mov cr4, rax; xor ecx, ecx; mov edx, 1; mov eax, 3; xsetbv",
        ),
        13,
    ),
    ("OUT with LOCK", code("f0e610", ".byte 0xf0; out 0x10, al"), 6),
    ("16 bytes", code("66666666 66666666 66666666 6666e610", ".fill 14, 1, 0x66; out 0x10, al"), 13),
]


@pytest.mark.parametrize(("what", "text", "vector"), REGISTERS, ids=[row[0] for row in REGISTERS])
def test_what_registers_do_not_take(any_host: Any, what: str, text: bytes, vector: int) -> None:
    with RingGuest(any_host, text, user=False) as guest:
        lack(guest, what)
        assert guest.fault()[:2] == (vector, 0 if vector == 13 else None)


TAKEN = [
    (
        "CR0: TS, and CLTS",
        code(
            "0f20c00c 080f22c0 0f01e10f 060f01e2 f4",
            "mov rax, cr0; or al, 8; mov cr0, rax; smsw ecx; clts; smsw edx; hlt",
        ),
        {"rcx": 0x8001003B, "rdx": 0x80010033},
    ),
    ("LMSW cannot clear PE", code("0f01e024 f00f01f0 0f01e1f4", "smsw eax; and al, 0xf0; lmsw ax; smsw ecx; hlt"), {"rcx": 0x80010031}),
    ("CR8", code("b8090000 00440f22 c031c944 0f20c1f4", "mov eax, 9; mov cr8, rax; xor ecx, ecx; mov rcx, cr8; hlt"), {"rcx": 9}),
    (
        "CR3: PCD and PWT",
        code("0f20d80c 180f22d8 0f20d9f4", "mov rax, cr3; or al, 0x18; mov cr3, rax; mov rcx, cr3; hlt"),
        {"rcx": PML4 | 0x18},
    ),
    (
        "DR4 is DR6 without CR4.DE",
        code("b8f10fff ff0f23e0 0f21f10f 21e2f4", "mov eax, 0xffff0ff1; mov dr4, rax; mov rcx, dr6; mov rdx, dr4; hlt"),
        {"rcx": 0xFFFF0FF1, "rdx": 0xFFFF0FF1},
    ),
    ("DR7's fixed bit", code("31c00f23 f80f21f9 f4", "xor eax, eax; mov dr7, rax; mov rcx, dr7; hlt"), {"rcx": 0x400}),
    (
        "XCR0",
        code(
            "0f20e00f bae8120f 22e031c9 31d2b801 0000000f 01d10f01 d0f4",
            "mov rax, cr4; bts eax, 18; mov cr4, rax; xor ecx, ecx; xor edx, edx; mov eax, 1; xsetbv; xgetbv; hlt",
        ),
        {"rax": 1},
    ),
]


@pytest.mark.parametrize(("what", "text", "expected"), TAKEN, ids=[row[0] for row in TAKEN])
def test_what_registers_take(any_host: Any, what: str, text: bytes, expected: dict[str, int]) -> None:
    with RingGuest(any_host, text, user=False) as guest:
        lack(guest, what)
        while guest.run() != Hlt():
            assert guest.vcpu.kvm_run.exit_reason == 11, "KVM_EXIT_SET_TPR"
        assert guest.regs().rip == CODE + len(text), f"vector {guest.vector()}"
        assert {name: getattr(guest.regs(), name) for name in expected} == expected


# ---- PAE's page-directory-pointer entries
TOP, OTHER, DIRECTORY = 0x40020, 0x40040, 0x41000  # 32-byte tables: aligned to no more than that
TURN_ON = code(
    "0f20e083 c8200f22 e0b82000 04000f22 d80f20c0 0fbae81f 0f22c090",
    "mov eax, cr4; or eax, 0x20; mov cr4, eax; mov eax, 0x40020; mov cr3, eax; mov eax, cr0; bts eax, 31; mov cr0, eax; nop",
    32,
)
RESERVED = [1 << 1, 1 << 2, 1 << 5, 1 << 8, 1 << 52, 1 << 63]


def needs(guest: ProtectedGuest, *, checked: bool) -> None:
    """Skip on a host without paging but in long mode, or (`checked`) without checks of the entries."""
    if not feature(guest, "hardware virtualization"):
        pytest.skip("a paravirtual KVM has paging in long mode only")
    if checked and not feature(guest, "an exact CPU"):
        pytest.skip("AMD processors under nested paging may read the entries at each walk, and the lab's CPU does")


def pae(guest: ProtectedGuest, *, top: int = 0, other: int = 0) -> None:
    """One directory of 2 MiB pages; `top` and `other` are extra bits of the second entries."""
    guest.put(TOP, struct.pack("<4Q", DIRECTORY | 1, DIRECTORY | 1 | top, 0x1E6, 0))
    guest.put(OTHER, struct.pack("<4Q", DIRECTORY | 1, DIRECTORY | 1 | other, 0, 0))
    guest.put(DIRECTORY, struct.pack("<512Q", *(n << 21 | 0x83 for n in range(512))))


@pytest.mark.parametrize("bit", [0, *RESERVED])
def test_cr0_loads_the_page_directory_pointers(any_host: Any, bit: int) -> None:
    """Bits of an entry that is not present do not matter."""
    with ProtectedGuest(any_host, TURN_ON + b"\xf4") as guest:
        needs(guest, checked=True)
        pae(guest, top=bit)
        assert guest.run() == Hlt()
        if bit:
            assert guest.vector() == 13 and guest.frame().error == 0 and guest.frame().eip == CODE + len(TURN_ON) - 4
        else:
            assert guest.regs().rip == CODE + len(TURN_ON) + 1 and guest.vcpu.get_sregs().cr0 >> 31 == 1


@pytest.mark.parametrize("bit", [0, *RESERVED])
def test_cr3_loads_the_page_directory_pointers(any_host: Any, bit: int) -> None:
    with ProtectedGuest(any_host, TURN_ON + code("bb400004 000f22db f4", "mov ebx, 0x40040; mov cr3, ebx; hlt", 32)) as guest:
        needs(guest, checked=True)
        pae(guest, other=bit)
        assert guest.run() == Hlt()
        if bit:
            assert guest.vector() == 13 and guest.frame().error == 0 and guest.vcpu.get_sregs().cr3 == TOP
        else:
            assert guest.vcpu.get_sregs().cr3 == OTHER


def test_cr4_loads_the_page_directory_pointers(any_host: Any) -> None:
    """When PGE changes; TSD has nothing to do with them."""
    text = code(
        "c7052800 04000310 04000f20 e083c804 0f22e00d 80000000 0f22e0f4",
        "mov dword ptr [0x40028], 0x41003; mov eax, cr4; or eax, 4; mov cr4, eax; or eax, 0x80; mov cr4, eax; hlt",
        32,
    )
    with ProtectedGuest(any_host, TURN_ON + text) as guest:
        needs(guest, checked=True)
        pae(guest)
        assert guest.run() == Hlt() and guest.vector() == 13
        assert guest.vcpu.get_sregs().cr4 & 0x84 == 4


# ---- delivery with 32-bit paging
@pytest.mark.parametrize("wide", [False, True], ids=["32-bit", "PAE"])
def test_a_triple_fault_with_paging(any_host: Any, wide: bool) -> None:
    """The stack is on a page that is not present: #PF while #PF is delivered, and again while #DF is."""
    enter = code(
        "b8000004 000f22d8 0f20e083 c8100f22 e0",
        "mov eax, 0x40000; mov cr3, eax; mov eax, cr4; or eax, 0x10; mov cr4, eax",
        32,
    )
    paging = code(
        "0f20c00f bae81f0f 22c0bc00 084000a0 00008000",
        "mov eax, cr0; bts eax, 31; mov cr0, eax; mov esp, 0x400800; mov al, [0x800000]",
        32,
    )
    with ProtectedGuest(any_host, (TURN_ON[:-8] if wide else enter) + paging) as guest:
        needs(guest, checked=False)
        if wide:
            pae(guest)
            guest.put(DIRECTORY + 16, bytes(8 * 8))  # from 4 MiB on
        else:
            guest.put(0x40000, struct.pack("<I", 0x83) + bytes(0xFFC))
        assert guest.run() == Shutdown()
        if feature(guest, "the model"):  # kvm_amd resets the vCPU, since the VMCB holds nothing defined
            assert guest.vcpu.get_sregs().cr2 == 0x4007FC


@pytest.mark.parametrize("wide", [False, True], ids=["32-bit", "PAE"])
def test_a_page_fault_with_paging(any_host: Any, wide: bool) -> None:
    enter = code(
        "b8000004 000f22d8 0f20e083 c8100f22 e0",
        "mov eax, 0x40000; mov cr3, eax; mov eax, cr4; or eax, 0x10; mov cr4, eax",
        32,
    )
    paging = code("0f20c00f bae81f0f 22c0a223 018000", "mov eax, cr0; bts eax, 31; mov cr0, eax; mov [0x800123], al", 32)
    with ProtectedGuest(any_host, (TURN_ON[:-8] if wide else enter) + paging) as guest:
        needs(guest, checked=False)
        if wide:
            pae(guest)
            guest.put(DIRECTORY + 16, bytes(8 * 8))
        else:
            guest.put(0x40000, struct.pack("<I", 0x83) + bytes(0xFFC))
        assert guest.run() == Hlt() and guest.vector() == 14
        assert guest.frame().error == 2 and guest.vcpu.get_sregs().cr2 == 0x800123


def test_et_is_always_set_for_the_guest(any_host: Any) -> None:
    """A processor has it wired; KVM shows user space what that set, until the guest runs."""
    with LongGuest(any_host, code("0f20c0 f4", "mov rax, cr0; hlt")) as guest:
        if not feature(guest, "hardware virtualization"):
            pytest.skip("paravirtual: the guest reads what was set")
        sregs = guest.vcpu.get_sregs()
        sregs.cr0 &= ~(1 << 4)
        guest.vcpu.set_sregs(sregs)
        assert guest.vcpu.get_sregs().cr0 == sregs.cr0
        assert guest.run() == Hlt() and guest.regs().rax == guest.vcpu.get_sregs().cr0 == sregs.cr0 | 1 << 4
