"""The guest's own way through the modes: real, protected, compatibility and 64-bit mode, and all the way back.

Everything stands in one page, so that the same page is code of three widths, and an OUT in each mode shows the operand
size that it has there.
"""

from __future__ import annotations

import struct
from typing import Any

from kvmapi.exits import Hlt, Io
from tests.conformance.snippets import REAL_CODE, RealGuest, code

GDTR, TABLE, TOP = 0x3000, 0x3008, 0x5000  # the tables of the tour; RealGuest's own code begins at 0x1000
CODE32, DATA32, CODE64, CODE16, DATA16 = 0x08, 0x10, 0x18, 0x20, 0x28
SEGMENTS = struct.pack("<6Q", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00AF9B000000FFFF, 0x00009B000000FFFF, 0x000093000000FFFF)

TO_PROTECTED = code(
    "fa0f0116 0030e710 0f20c00c 010f22c0 66ea0011 00000800",
    "cli; lgdt [0x3000]; out 0x10, ax; mov eax, cr0; or al, 1; mov cr0, eax; .att_syntax; ljmpl $8, $0x1100; .intel_syntax noprefix",
    16,
)
TO_LONG = code(
    "66b81000 8ed88ec0 8ed0bc00 800000e7 100f20e0 83c8200f 22e0b800 5000000f 22d8b980 0000c00f 320d0001 "
    "00000f30 0f20c00d 00000080 0f22c0b8 0c000000 e710ea00 12000018 00",
    "mov ax, 0x10; mov ds, ax; mov es, ax; mov ss, ax; mov esp, 0x8000; out 0x10, eax; mov eax, cr4; or "
    "eax, 0x20; mov cr4, eax;mov eax, 0x5000; mov cr3, eax; mov ecx, 0xc0000080; rdmsr; or eax, 0x100; "
    "wrmsr; mov eax, cr0; or eax, 0x80000000; mov cr0, eax;mov eax, 0xc; out 0x10, eax; ljmp 0x18:0x1200",
    32,
)
IN_LONG = code(
    "48b88877 66554433 22114889 c3e710b9 800000c0 0f324889 c66a0868 00130000 48cb",
    "movabs rax, 0x1122334455667788; mov rbx, rax; out 0x10, eax; mov ecx, 0xc0000080; rdmsr; mov rsi, "
    "rax; push 0x8; push 0x1300; rex.W retf",
)
OUT_OF_LONG = code(
    "b80d0000 00e7100f 20c025ff ffff7f0f 22c0b980 0000c00f 3289c725 fffeffff 0f300f20 e083e0df 0f22e0b8 0e000000 e710ea00 14000020 00",
    "mov eax, 0xd; out 0x10, eax; mov eax, cr0; and eax, 0x7fffffff; mov cr0, eax; mov ecx, 0xc0000080; "
    "rdmsr; mov edi, eax;and eax, 0xfffffeff; wrmsr; mov eax, cr4; and eax, 0xffffffdf; mov cr4, eax; mov "
    "eax, 0xe; out 0x10, eax; ljmp 0x20:0x1400",
    32,
)
TO_REAL = code(
    "b828008e d88ec08e d066b80f 000500e7 100f20c0 24fe0f22 c0ea0015 0000",
    "mov ax, 0x28; mov ds, ax; mov es, ax; mov ss, ax; mov eax, 0x5000f; out 0x10, ax; mov eax, cr0; and "
    "al, 0xfe; mov cr0, eax;ljmp 0, 0x1500",
    16,
)
IN_REAL = code("31c08ed8 8ed0b877 00e710f4", "xor ax, ax; mov ds, ax; mov ss, ax; mov ax, 0x77; out 0x10, ax; hlt", 16)


def tour(guest: RealGuest) -> None:
    guest.put(GDTR, struct.pack("<HI", len(SEGMENTS) - 1, TABLE))
    guest.put(TABLE, SEGMENTS)
    guest.put(TOP, struct.pack("<Q", 0x6003))
    guest.put(0x6000, struct.pack("<Q", 0x7003))
    guest.put(0x7000, struct.pack("<Q", 0x83))
    for at, text in ((0x1100, TO_LONG), (0x1200, IN_LONG), (0x1300, OUT_OF_LONG), (0x1400, TO_REAL), (0x1500, IN_REAL)):
        guest.put(at, text)


STATIONS = [
    (2, 0, 0x10, 0),  # real
    (4, 0x10, 0x11, 0),  # protected
    (4, 0xC, 0x80000011, 0x500),  # compatibility
    (4, 0x55667788, 0x80000011, 0x500),  # 64-bit
    (4, 0xD, 0x80000011, 0x500),  # compatibility
    (4, 0xE, 0x11, 0),  # protected
    (2, 0xF, 0x11, 0),  # protected, 16 bits
    (2, 0x77, 0x10, 0),  # real
]


def test_through_the_modes_and_back(any_host: Any) -> None:
    """Twice, so that the second time every page was code of another width before."""
    with RealGuest(any_host, TO_PROTECTED) as guest:
        tour(guest)
        sregs = guest.vcpu.get_sregs()
        sregs.cr0 = 0x10
        guest.vcpu.set_sregs(sregs)
        for _ in range(2):
            guest.regs(rip=REAL_CODE, rax=0, rsp=REAL_CODE)
            for size, value, cr0, efer in STATIONS:
                exit = guest.run()
                assert isinstance(exit, Io), exit
                sregs = guest.vcpu.get_sregs()
                assert (exit.size, int.from_bytes(exit.data, "little"), sregs.cr0 & 0x8000003F, sregs.efer) == (size, value, cr0, efer)
            assert guest.run() == Hlt()
            regs = guest.regs()
            assert (regs.rbx, regs.rsi, regs.rdi) == (0x1122334455667788, 0x500, 0x100)
