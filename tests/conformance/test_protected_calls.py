"""32-bit protected mode: SYSENTER and SYSCALL, call gates, the LDT, virtual-8086 code and IOPL, ring 3's limits."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kvmapi.exits import Hlt
from tests.conformance.protected import (
    CODE32,
    DATA32,
    LDT_SELECTOR,
    SPARE,
    USER_CODE,
    USER_DATA,
    USER_STACK,
    ProtectedGuest,
    segment_descriptor,
)  # fmt: skip
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, STACK, code

ENTRY = 0x18000
IF, IOPL3 = 1 << 9, 3 << 12
SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP, STAR = 0x174, 0x175, 0x176, 0xC0000081


class CallGuest(ProtectedGuest):
    """Skips where ring 3 is beyond the kernel."""

    def __enter__(self) -> CallGuest:
        if not feature(self, "hardware virtualization"):
            self.__exit__()
            pytest.skip("a paravirtual KVM emulates protected mode loosely, see docs/fidelity.md")
        return self


def test_sysenter_and_sysexit(any_host: Any) -> None:
    """CS and SS by SYSENTER_CS: kernel code and data, then user code and data at 16 and 24 behind."""
    with CallGuest(any_host, code("ba200001 00b90070 02000f34", "mov edx, 0x10020; mov ecx, 0x27000; sysenter", 32)) as guest:
        guest.put(CODE + 0x20, code("8ccb8cd6 89e7f4", "mov ebx, cs; mov esi, ss; mov edi, esp; hlt", 32))
        guest.put(ENTRY, code("8ccd9c58 0f35", "mov ebp, cs; pushfd; pop eax; sysexit", 32))
        guest.set_descriptor(SPARE, segment_descriptor(0, 0xFFFFF, 0x9B, 12))
        guest.vcpu.set_msrs({SYSENTER_CS: CODE32, SYSENTER_ESP: 0x26000, SYSENTER_EIP: ENTRY})
        guest.regs(rflags=2 | IF)
        assert guest.run() == Hlt() and guest.vector() == 13, "HLT in ring 3"
        regs = guest.regs()
        assert (regs.rbx, regs.rsi, regs.rdi, regs.rbp) == (CODE32 + 16 | 3, CODE32 + 24 | 3, 0x27000, CODE32)
        assert not regs.rax & IF and guest.frame().cs == CODE32 + 16 | 3


def test_sysenter_without_a_segment(any_host: Any) -> None:
    with CallGuest(any_host, code("0f34", "sysenter", 32)) as guest:
        guest.vcpu.set_msrs({SYSENTER_CS: 3 if feature(guest, "an exact CPU") else 0})  # the lab's CPU looks at all bits
        assert guest.run() == Hlt() and guest.vector() == 13 and guest.frame().error == 0 and guest.frame().eip == CODE


def test_sysexit_in_ring_3(any_host: Any) -> None:
    with CallGuest(any_host, code("0f35", "sysexit", 32), user=True) as guest:
        guest.vcpu.set_msrs({SYSENTER_CS: CODE32})
        assert guest.run() == Hlt() and guest.vector() == 13 and guest.frame().error == 0 and guest.frame().eip == CODE


def test_syscall_and_sysret(any_host: Any) -> None:
    """The legacy form: EIP from STAR, no flags saved."""
    with CallGuest(any_host, code("0f05bb05 000000f4", "syscall; mov ebx, 5; hlt", 32), user=True) as guest:
        sregs = guest.vcpu.get_sregs()
        sregs.efer |= 1
        guest.vcpu.set_sregs(sregs)
        guest.vcpu.set_msrs({STAR: (USER_CODE & ~3) << 48 | CODE32 << 32 | ENTRY})
        guest.put(ENTRY, code("8cce8cd7 89cd9c58 0f07", "mov esi, cs; mov edi, ss; mov ebp, ecx; pushfd; pop eax; .byte 0x0f, 0x07", 32))
        assert guest.run() == Hlt() and guest.vector() == 13
        regs, frame = guest.regs(), guest.frame()
        assert (regs.rbx, regs.rsi, regs.rdi, regs.rbp) == (5, CODE32, DATA32, CODE + 2) and not regs.rax & IF
        assert (frame.eip, frame.cs, frame.ss) == (CODE + 7, USER_CODE, USER_DATA) and frame.eflags & IF


def test_a_call_gate_with_parameters(any_host: Any) -> None:
    with CallGuest(
        any_host, code("6a116a22 9a000000 005b00bb 07000000 f4", "push 0x11; push 0x22; call 0x5b:0; mov ebx, 7; hlt", 32), user=True
    ) as guest:
        guest.set_descriptor(SPARE, struct.pack("<HHBBH", ENTRY & 0xFFFF, CODE32, 2, 0xEC, ENTRY >> 16))
        guest.put(
            ENTRY,
            code(
                "8b742408 8b7c240c 8b6c2414 89e1ca08 00",
                "mov esi, [esp + 8]; mov edi, [esp + 12]; mov ebp, [esp + 20]; mov ecx, esp; retf 8",
                32,
            ),
        )
        assert guest.run() == Hlt() and guest.vector() == 13
        regs = guest.regs()
        assert (regs.rbx, regs.rsi, regs.rdi, regs.rbp, regs.rcx) == (7, 0x22, 0x11, USER_DATA, STACK - 24)
        assert guest.frame().esp == USER_STACK and guest.frame().cs == USER_CODE


def ldt(guest: ProtectedGuest) -> None:
    """An LDT with code and data of a base."""
    guest.set_descriptor(LDT_SELECTOR, segment_descriptor(0x32000, 0x17, 0x82, 0))
    guest.put(0x32000, bytes(8) + segment_descriptor(ENTRY, 0xFFFF, 0x9A, 4) + segment_descriptor(0x33000, 0xFFF, 0x92, 4))


def test_the_ldt(any_host: Any) -> None:
    """A segment of it, and a handler's code in it, at a base; both are marked as accessed."""
    with CallGuest(
        any_host,
        code(
            "b8680000 000f00d0 b8140000 008ee064 8b1d1000 00000f0b",
            "mov eax, 0x68; lldt ax; mov eax, 0x14; mov fs, ax; mov ebx, fs:[0x10]; ud2",
            32,
        ),
    ) as guest:
        ldt(guest)
        guest.put(0x33010, b"\x78\x56\x34\x12")
        guest.set_gate(6, 0x10, 0x0C)
        guest.put(ENTRY + 0x10, b"\xf4")
        assert guest.run() == Hlt()
        sregs = guest.vcpu.get_sregs()
        assert guest.regs().rbx == 0x12345678 and guest.regs().rip == 0x11
        assert (sregs.cs.selector, sregs.cs.base, sregs.fs.selector) == (0x0C, ENTRY, 0x14)
        if feature(guest, "an exact CPU"):  # the lab's does not mark a handler's code
            assert guest.get(0x3200D, 1) == b"\x9b"
        assert guest.get(0x32015, 1) == b"\x93"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (code("b8680000 000f00d0 b81c0000 008ee0", "mov eax, 0x68; lldt ax; mov eax, 0x1c; mov fs, ax", 32), 0x1C),
        (code("b80c0000 008ee0", "mov eax, 0x0c; mov fs, ax", 32), 0x0C),
        (code("b8100000 000f00d0", "mov eax, 0x10; lldt ax", 32), 0x10),
        (code("b86c0000 000f00d0", "mov eax, 0x6c; lldt ax", 32), 0x6C),
    ],
)
def test_wrong_uses_of_the_ldt(any_host: Any, text: bytes, error: int) -> None:
    """Past its end; without one; data for one; one in itself."""
    with CallGuest(any_host, text) as guest:
        ldt(guest)
        assert guest.run() == Hlt() and guest.vector() == 13 and guest.frame().error == error


ENTER_VM86 = code(
    "6a006a00 6a006a00 68003000 00680008 00005368 00100000 68000100 00cf",
    "push 0; push 0; push 0; push 0; push 0x3000; push 0x800; push ebx; push 0x1000; push 0x100; iretd",
    32,
)


@pytest.mark.parametrize(
    "text",
    [
        code("fa", "cli", 16),
        code("fb", "sti", 16),
        code("9c", "pushf", 16),
        code("9d", "popf", 16),
        code("cd21", "int 0x21", 16),
        code("cf", "iret", 16),
    ],
)
def test_virtual_8086_code_below_iopl_3(any_host: Any, text: bytes) -> None:
    with CallGuest(any_host, ENTER_VM86) as guest:
        guest.put(0x10100, text)
        guest.regs(rbx=0x20002)
        assert guest.run() == Hlt() and guest.vector() == 13
        assert guest.frame().error == 0 and guest.frame().eip == 0x100


@pytest.mark.parametrize(
    ("text", "vector"),
    [
        (code("cd21", "int 0x21", 16), 0x21),
        (code("cc", "int3", 16), 3),
        (code("f4", "hlt", 16), 13),
        (code("0f22c0", "mov cr0, eax", 16), 13),
    ],
)
def test_virtual_8086_code_at_iopl_3(any_host: Any, text: bytes, vector: int) -> None:
    """INT n goes through the protected-mode IDT; what is privileged is #GP."""
    with CallGuest(any_host, ENTER_VM86) as guest:
        guest.put(0x10100, text)
        guest.regs(rbx=0x23002)
        assert guest.run() == Hlt() and guest.vector() == vector
        assert guest.frame().eip == 0x100 + (len(text) if vector in (3, 0x21) else 0)


def test_virtual_8086_code_and_a_handler_that_is_not_ring_0(any_host: Any) -> None:
    """#GP with the handler's selector: virtual-8086 code is left for ring 0 only."""
    with CallGuest(any_host, ENTER_VM86) as guest:
        guest.put(0x10100, code("cd21", "int 0x21", 16))
        guest.regs(rbx=0x23002)
        guest.set_gate(0x21, ENTRY, USER_CODE)
        assert guest.run() == Hlt() and guest.vector() == 13 and guest.frame().error == USER_CODE & ~3


@pytest.mark.parametrize(
    "text",
    [
        code("f4", "hlt", 32),
        code("fa", "cli", 32),
        code("fb", "sti", 32),
        code("0f20c0", "mov eax, cr0", 32),
        code("0f22d8", "mov cr3, eax", 32),
        code("0f23f8", "mov dr7, eax", 32),
        code("0f011500 500000", "lgdt [0x5000]", 32),
        code("0f011d00 500000", "lidt [0x5000]", 32),
        code("0f01f0", "lmsw ax", 32),
        code("0f06", "clts", 32),
        code("0f0138", "invlpg [eax]", 32),
        code("0f09", "wbinvd", 32),
        code("0f32", "rdmsr", 32),
        code("0f30", "wrmsr", 32),
        code("0f00d8", "ltr ax", 32),
        code("0f00d0", "lldt ax", 32),
    ],
    ids=lambda text: text.hex(),
)
def test_privileged_instructions_in_ring_3(any_host: Any, text: bytes) -> None:
    with CallGuest(any_host, text, user=True) as guest:
        assert guest.run() == Hlt() and guest.vector() == 13
        assert guest.frame()[:3] == (0, CODE, USER_CODE)


def test_popf_and_iret_in_ring_3_keep_iopl(any_host: Any) -> None:
    """Neither IF nor IOPL changes above IOPL, silently."""
    with CallGuest(
        any_host,
        code("9c583500 32000050 9d9c5bf4", "pushfd; pop eax; xor eax, 0x3200; push eax; popfd; pushfd; pop ebx; hlt", 32),
        user=True,
    ) as guest:
        guest.regs(rflags=2 | IF)
        assert guest.run() == Hlt() and guest.vector() == 13
        assert guest.regs().rbx & (IF | IOPL3) == IF
