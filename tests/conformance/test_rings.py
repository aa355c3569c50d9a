"""64-bit mode with rings: SYSCALL and its kin, privileged instructions in ring 3, wrong selectors and addresses,
compatibility code, and what control and debug registers take.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kvmapi.exits import Hlt
from kvmapi.host import Host
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, IDT, PD_LOW, PDPT, PML4, STACK, STUBS, TSS, LongGuest, code

TABLE, USER_STACK, RING3, ENTRY, COMPAT_ENTRY = 0xA000, 0x28000, CODE + 0x100, CODE + 0x400, CODE + 0x500
KERNEL_CODE, KERNEL_DATA, TASK, COMPAT_CODE, USER_COMPAT, USER_DATA, USER_CODE, GATE, EMPTY = (
    0x08,
    0x10,
    0x18,
    0x28,
    0x33,
    0x3B,
    0x43,
    0x48,
    0x58,
)
EFER, STAR, LSTAR, CSTAR, SFMASK, KERNEL_GS = 0xC0000080, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000102
RF, IF = 1 << 16, 1 << 9
ENTER_RING_3 = code(
    "6a3b6800 8002009c 6a436800 01010048 cf",
    "push 0x3b; push 0x28000; pushfq; push 0x43; push 0x10100; iretq",
)


LACKS = {
    # SYSCALL's flags and DF, SYSRET to compatibility code, call gates, INT n, selectors in error codes of IRETQ, #SS
    "a paravirtual KVM": {
        "syscall", "no SCE", "compatibility code", "call gate", "IRETQ to data", "INT n by a gate that is the kernel's", "stack",
        "CR0: bit 32", "XCR0",
    },
    # QEMU takes a null LTR, LOCK, wide CR0 and CR3, raises #GP for #SS, and has vector * 16 + 2 in error codes of gates
    "the lab's CPU": {
        "LTR of null", "INT n by a gate that is the kernel's", "stack", "CR0: bit 32", "CR3: bit 52", "CR3: bit 63", "OUT with LOCK",
    },
}  # fmt: skip


def lack(guest: LongGuest, name: str) -> None:
    """Skip what this host is known to lack."""
    who = "the lab's CPU" if not feature(guest, "an exact CPU") else "a paravirtual KVM"
    exact = feature(guest, "the model") or (feature(guest, "an exact CPU") and feature(guest, "hardware virtualization"))
    if not exact and name in LACKS[who]:
        pytest.skip(f"{who}: {name} is a known difference, see docs/fidelity.md")


class RingGuest(LongGuest):
    """Segments of both rings and widths, SYSCALL's MSRs; `user`: begins with an IRETQ to ring 3, where `text` is."""

    def __init__(self, host: Host, text: bytes, *, user: bool = True) -> None:
        super().__init__(host, ENTER_RING_3 if user else text)
        if user:
            self.put(RING3, text)
        for at, count in ((PML4, 1), (PDPT, 4), (PD_LOW, 511)):
            entries = struct.unpack(f"<{count}Q", self.get(at, 8 * count))
            self.put(at, struct.pack(f"<{count}Q", *(entry | 4 if entry else 0 for entry in entries)))
        self.put(
            TABLE,
            struct.pack(
                "<12Q",
                0,
                0x00AF9B000000FFFF,
                0x00CF93000000FFFF,
                TSS << 16 | 0x890000000067,
                0,
                0x00CF9B000000FFFF,
                0x00CFFB000000FFFF,
                0x00CFF3000000FFFF,
                0x00AFFB000000FFFF,
                0,
                0,
                0,
            ),
        )
        self.put(TSS + 4, struct.pack("<Q", STACK))
        self.put(TSS + 0x66, struct.pack("<H", 0x68))  # no I/O permission bitmap
        sregs = self.vcpu.get_sregs()
        sregs.gdt.base, sregs.gdt.limit = TABLE, 12 * 8 - 1
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_msrs({STAR: 0x0030 << 48 | 0x0008 << 32, LSTAR: ENTRY, CSTAR: COMPAT_ENTRY, SFMASK: 0x700})

    def fault(self) -> tuple[int, int | None, int]:
        """Run to a handler: its vector, the error code, and the RIP in the frame."""
        assert self.run() == Hlt()
        return self.vector(), self.frame().error, self.frame().rip


def test_syscall_and_sysret(any_host: Any) -> None:
    with RingGuest(any_host, code("b8050000 000f0589 c3f4", "mov eax, 5; syscall; mov ebx, eax; hlt")) as guest:
        lack(guest, "syscall")
        guest.put(
            ENTRY,
            code(
                "4989cf4d 89de4989 e5418cd4 8ccd9c5a ffc0480f 07",
                "mov r15, rcx; mov r14, r11; mov r13, rsp; mov r12d, ss; mov ebp, cs; pushfq; pop rdx; inc eax; .byte 0x48, 0x0f, 0x07",
            ),
        )
        guest.regs(rflags=2 | IF | 0x400 | 1)
        vector, error, rip = guest.fault()
        regs, frame = guest.regs(), guest.frame()
        assert (vector, error, rip, regs.rbx) == (13, 0, RING3 + 9, 6)
        assert (regs.r15, regs.r14, regs.r13, regs.r12, regs.rbp) == (RING3 + 7, 0x603, USER_STACK, KERNEL_DATA, KERNEL_CODE)
        assert not regs.rdx & 0x700, "SFMASK cleared IF, TF and DF"
        assert (frame.cs, frame.ss, frame.rflags & ~RF) == (USER_CODE, USER_DATA, 0x603)


def test_syscall_needs_efer_sce(any_host: Any) -> None:
    for user in (True, False):
        with RingGuest(any_host, code("0f05", "syscall"), user=user) as guest:
            lack(guest, "no SCE")
            sregs = guest.vcpu.get_sregs()
            sregs.efer &= ~1
            guest.vcpu.set_sregs(sregs)
            assert guest.fault() == (6, None, RING3 if user else CODE)


def test_sysret_to_compatibility_code(any_host: Any) -> None:
    """40 is INC EAX there; INT3 enters a 64-bit handler with a 64-bit frame."""
    with RingGuest(
        any_host,
        code("b9000101 0041bb02 000000b8 07000000 0f07", "mov ecx, 0x10100; mov r11d, 2; mov eax, 7; .byte 0x0f, 0x07"),
        user=False,
    ) as guest:
        lack(guest, "compatibility code")
        guest.put(RING3, code("400f0b", "inc eax; ud2", 32))
        assert guest.fault() == (6, None, RING3 + 1) and guest.regs().rax == 8
        assert guest.frame()[2:] == (USER_COMPAT, 2 | RF, STACK, USER_DATA) and guest.vcpu.get_sregs().cs.l == 1


def test_syscall_from_compatibility_code(any_host: Any) -> None:
    """On AMD processors it enters CSTAR."""
    with RingGuest(any_host, code("b9000101 0041bb02 0000000f 07", "mov ecx, 0x10100; mov r11d, 2; .byte 0x0f, 0x07"), user=False) as guest:
        lack(guest, "compatibility code")
        guest.put(RING3, code("0f05", "syscall", 32))
        guest.put(COMPAT_ENTRY, b"\xf4")
        guest.put(STUBS + 96, b"\xf4")
        assert guest.run() == Hlt()
        if guest.regs().rip != COMPAT_ENTRY + 1:
            assert guest.vector() == 6
            pytest.skip("this host's processor has no SYSCALL in compatibility mode")
        assert guest.regs().rcx == RING3 + 2 and guest.vcpu.get_sregs().cs.selector == KERNEL_CODE


@pytest.mark.parametrize("text", [code("0f34", "sysenter", 32), code("0f35", "sysexit", 32)])
def test_sysenter_is_not_amd_in_long_mode(any_host: Any, text: bytes) -> None:
    with RingGuest(any_host, code("ff2c2500 020100", ".byte 0xff, 0x2c, 0x25, 0, 2, 1, 0"), user=False) as guest:
        if not feature(guest, "the model"):
            pytest.skip("QEMU's CPU has it, and kernels on other processors")
        guest.put(CODE + 0x200, struct.pack("<IH", CODE + 0x300, COMPAT_CODE))
        guest.put(CODE + 0x300, text)
        assert guest.fault() == (6, None, CODE + 0x300)


def test_swapgs(any_host: Any) -> None:
    with RingGuest(
        any_host,
        code(
            "0f01f865 488b0425 00000000 0f01f865 488b1c25 00000000 f4",
            "swapgs; mov rax, gs:[0]; swapgs; mov rbx, gs:[0]; hlt",
        ),
        user=False,
    ) as guest:
        guest.vcpu.set_msrs({KERNEL_GS: 0x30000})
        guest.put(0x30000, struct.pack("<Q", 0x1122))
        sregs = guest.vcpu.get_sregs()
        sregs.gs.base = 0x30100
        guest.vcpu.set_sregs(sregs)
        guest.put(0x30100, struct.pack("<Q", 0x3344))
        assert guest.run() == Hlt() and (guest.regs().rax, guest.regs().rbx) == (0x1122, 0x3344)


PRIVILEGED = [
    code("f4", "hlt"),
    code("fa", "cli"),
    code("fb", "sti"),
    code("e410", "in al, 0x10"),
    code("e610", "out 0x10, al"),
    code("6e", "outsb"),
    code("f36c", "rep insb"),
    code("0f011425 00020100", "lgdt [0x10200]"),
    code("0f011c25 00020100", "lidt [0x10200]"),
    code("0f00d0", "lldt ax"),
    code("0f00d8", "ltr ax"),
    code("0f01f0", "lmsw ax"),
    code("0f06", "clts"),
    code("0f20c0", "mov rax, cr0"),
    code("0f22c0", "mov cr0, rax"),
    code("0f22d0", "mov cr2, rax"),
    code("0f22d8", "mov cr3, rax"),
    code("0f22e0", "mov cr4, rax"),
    code("440f22c0", "mov cr8, rax"),
    code("440f20c0", "mov rax, cr8"),
    code("0f21f8", "mov rax, dr7"),
    code("0f23f8", "mov dr7, rax"),
    code("0f23c0", "mov dr0, rax"),
    code("0f0138", "invlpg [rax]"),
    code("0f09", "wbinvd"),
    code("0f08", "invd"),
    code("0f32", "rdmsr"),
    code("0f30", "wrmsr"),
    code("0f01f8", "swapgs"),
    code("480f07", ".byte 0x48, 0x0f, 0x07"),
]


@pytest.mark.parametrize("text", PRIVILEGED, ids=lambda text: text.hex())
def test_privileged_instructions_in_ring_3(any_host: Any, text: bytes) -> None:
    with RingGuest(any_host, text) as guest:
        guest.regs(rcx=0x10, rax=0, rdx=0)
        assert guest.fault() == (13, 0, RING3) and guest.frame().cs == USER_CODE


WRONG = [
    ("a null SS in ring 3", True, code("31c08ed0", "xor eax, eax; mov ss, ax"), 13, 0),
    ("a null SS with RPL 3 in ring 3", True, code("b8030000 008ed0", "mov eax, 3; mov ss, ax"), 13, 0),
    ("kernel data as SS in ring 3", True, code("b8100000 008ed0", "mov eax, 0x10; mov ss, ax"), 13, 0x10),
    ("kernel data as DS in ring 3", True, code("b8100000 008ed8", "mov eax, 0x10; mov ds, ax"), 13, 0x10),
    ("code as SS", False, code("b8080000 008ed0", "mov eax, 8; mov ss, ax"), 13, 8),
    ("a selector past the table", False, code("b8600000 008ed8", "mov eax, 0x60; mov ds, ax"), 13, 0x60),
    ("the TSS as DS", False, code("b8180000 008ed8", "mov eax, 0x18; mov ds, ax"), 13, 0x18),
    ("an empty descriptor", False, code("b8580000 008ec0", "mov eax, 0x58; mov es, ax"), 13, 0x58),
    (
        "IRETQ to ring 0 from ring 3",
        True,
        code("6a106800 1000009c 6a086800 00010048 cf", "push 0x10; push 0x1000; pushfq; push 8; push 0x10000; iretq"),
        13,
        8,
    ),
    (
        "IRETQ to a null CS",
        False,
        code("6a106800 1000009c 6a006800 00010048 cf", "push 0x10; push 0x1000; pushfq; push 0; push 0x10000; iretq"),
        13,
        0,
    ),
    (
        "IRETQ to data",
        False,
        code(
            "6a106800 1000009c 6a106800 00010048 cf",
            "push 0x10; push 0x1000; pushfq; push 0x10; push 0x10000; iretq",
        ),
        13,
        0x10,
    ),
    (
        "IRETQ to ring 3 with a null SS",
        False,
        code("6a036800 1000009c 6a436800 00010048 cf", "push 3; push 0x1000; pushfq; push 0x43; push 0x10000; iretq"),
        13,
        0,
    ),
    (
        "IRETQ with NT",
        False,
        code(
            "68024000 009d6a10 68001000 009c6a08 68000001 0048cf",
            "push 0x4002; popfq; push 0x10; push 0x1000; pushfq; push 8; push 0x10000; iretq",
        ),
        13,
        0,
    ),
    ("a far return to ring 0 from ring 3", True, code("6a086800 00010048 cb", "push 8; push 0x10000; rex.W retf"), 13, 8),
    ("a far return to nothing", False, code("6a586800 00010048 cb", "push 0x58; push 0x10000; rex.W retf"), 13, 0x58),
    ("LTR of a busy TSS", False, code("b8180000 000f00d8 0f00d8", "mov eax, 0x18; ltr ax; ltr ax"), 13, 0x18),
    ("LTR of null", False, code("31c00f00 d8", "xor eax, eax; ltr ax"), 13, 0),
    ("LLDT of data", False, code("b8100000 000f00d0", "mov eax, 0x10; lldt ax"), 13, 0x10),
    ("INT n by a gate that is the kernel's", True, code("cd07", "int 7"), 13, 7 * 8 + 2),
]


@pytest.mark.parametrize(("what", "user", "text", "vector", "error"), WRONG, ids=[row[0] for row in WRONG])
def test_wrong_selectors(any_host: Any, what: str, user: bool, text: bytes, vector: int, error: int) -> None:
    with RingGuest(any_host, text, user=user) as guest:
        lack(guest, what)
        assert guest.fault()[:2] == (vector, error)


NOT_CANONICAL = [
    code("48b80000 00000080 0000ffe0", "movabs rax, 0x800000000000; jmp rax"),
    code("48b80000 00000080 0000ffd0", "movabs rax, 0x800000000000; call rax"),
    code("48b80000 00000080 000050c3", "movabs rax, 0x800000000000; push rax; ret"),
    code(
        "48b90000 00000080 00006a10 68001000 009c6a08 5148cf",
        "movabs rcx, 0x800000000000; push 0x10; push 0x1000; pushfq; push 8; push rcx; iretq",
    ),
    code("48b8ffff ffffff7f ffff8a00", "movabs rax, 0xffff7fffffffffff; mov al, [rax]"),
    code("48b80000 00000080 00000f01 10", "movabs rax, 0x800000000000; lgdt [rax]"),
    code(
        "48b80000 00000080 0000b900 0100c048 89c248c1 ea200f30",
        "movabs rax, 0x800000000000; mov ecx, 0xc0000100; mov rdx, rax; shr rdx, 32; wrmsr",
    ),
]


@pytest.mark.parametrize("text", NOT_CANONICAL, ids=lambda text: text.hex())
def test_addresses_that_are_not_canonical(any_host: Any, text: bytes) -> None:
    with RingGuest(any_host, text, user=False) as guest:
        assert guest.fault()[:2] == (13, 0)


@pytest.mark.parametrize(
    "text",
    [
        code("48bc0010 00000080 000050", "movabs rsp, 0x800000001000; push rax"),
        code("48bd0000 00000080 00008a45 00", "movabs rbp, 0x800000000000; mov al, [rbp]"),
    ],
)
def test_a_stack_that_is_not_canonical(any_host: Any, text: bytes) -> None:
    with RingGuest(any_host, text, user=False) as guest:
        lack(guest, "stack")
        guest.put(TSS + 0x24, struct.pack("<Q", 0x1F000))
        guest.put(IDT + 16 * 12 + 4, b"\1")
        assert guest.fault()[:2] == (12, 0)


def test_a_call_gate(any_host: Any) -> None:
    """CALL through a 64-bit gate to ring 0 and back: the new stack is the TSS's, the old one is on it."""
    with RingGuest(any_host, code("ff1c2500 02010089 c3f4", ".byte 0xff, 0x1c, 0x25, 0, 2, 1, 0; mov ebx, eax; hlt")) as guest:
        lack(guest, "call gate")
        guest.put(CODE + 0x200, struct.pack("<IH", 0, GATE | 3))
        guest.put(TABLE + GATE, struct.pack("<HHHHII", ENTRY & 0xFFFF, KERNEL_CODE, 0xEC00, ENTRY >> 16, 0, 0))
        guest.put(
            ENTRY,
            code(
                "4989e74c 8b742418 418cd5b8 4d000000 48cb",
                "mov r15, rsp; mov r14, [rsp + 24]; mov r13d, ss; mov eax, 77; rex.W retf",
            ),
        )
        assert guest.fault()[0] == 13
        regs = guest.regs()
        assert (regs.rbx, regs.r15, regs.r14, regs.r13) == (77, STACK - 32, USER_DATA, 0)
        assert guest.frame().cs == USER_CODE
