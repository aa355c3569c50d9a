"""Exceptions in 32-bit protected mode without paging, through 32- and 16-bit gates: frames, stacks, levels, error codes.

A paravirtual kernel has no INT n and follows the manuals loosely where a delivery fails: `needs_exact` says so.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kvmapi.exits import Hlt, Io, Shutdown
from tests.conformance.protected import (
    ABSENT_CODE,
    ABSENT_DATA,
    CODE16,
    CODE32,
    CONFORMING,
    DATA32,
    INTERRUPT16,
    INTERRUPT32,
    SPARE,
    TASK,
    TASK_GATE,
    TASK_TSS,
    TRAP16,
    TRAP32,
    TSS_SELECTOR,
    USER_CODE,
    USER_DATA,
    USER_STACK,
    Frame32,
    ProtectedGuest,
    segment_descriptor,
)  # fmt: skip
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, GDT, PAGE, STACK, STUBS, TSS, code

RF, IF, TF, VM, IOPL3 = 1 << 16, 1 << 9, 1 << 8, 1 << 17, 3 << 12
UD2 = code("0f0b", "ud2", 32)
INT21 = code("cd21", "int 0x21", 32)


def needs_exact(guest: ProtectedGuest) -> None:
    """Skip on a kernel that emulates what hardware delivers."""
    if not feature(guest, "hardware virtualization"):
        pytest.skip("a paravirtual KVM emulates INT n, IRET, gates and levels loosely or not at all, see docs/fidelity.md")


@pytest.mark.parametrize(("kind", "flags"), [(INTERRUPT32, 2), (TRAP32, 2 | IF)], ids=["interrupt gate", "trap gate"])
def test_same_level(any_host: Any, kind: int, flags: int) -> None:
    with ProtectedGuest(any_host, UD2) as guest:
        guest.set_gate(6, STUBS + 16 * 6, kind=kind)
        guest.regs(rflags=2 | IF)
        assert guest.run() == Hlt() and guest.vector() == 6
        assert guest.frame()[:4] == (None, CODE, CODE32, 2 | IF | RF) and guest.regs().rsp == STACK - 12
        assert guest.regs().rflags == flags and guest.vcpu.get_sregs().cs.selector == CODE32


@pytest.mark.parametrize(("text", "vector", "error"), [
    (code("66b87000 8ed8", "mov ax, 0x70; mov ds, ax", 32), 13, 0x70),
    (code("66b85000 8ed8", "mov ax, 0x50; mov ds, ax", 32), 11, 0x50),
    (code("66b85000 8ed0", "mov ax, 0x50; mov ss, ax", 32), 12, 0x50),
    (code("31c9f7f1", "xor ecx, ecx; div ecx", 32), 0, None),
    (code("b9bc0a00 400f32", "mov ecx, 0x40000abc; rdmsr", 32), 13, 0),
    (code("ea000001 004800", "ljmp 0x48:0x10000", 32), 11, 0x48),
    (code("ea000001 001000", "ljmp 0x10:0x10000", 32), 13, 0x10),
    (code("31c08ed0", "xor eax, eax; mov ss, ax", 32), 13, 0),
    (code("b8100000 800f22c0", "mov eax, 0x80000010; mov cr0, eax", 32), 13, 0),
    (code("0f20e00f bae81f0f 22e0", "mov eax, cr4; bts eax, 31; mov cr4, eax", 32), 13, 0),
])  # fmt: skip
def test_faults_of_instructions(any_host: Any, text: bytes, vector: int, error: int | None) -> None:
    with ProtectedGuest(any_host, text) as guest:
        assert guest.run() == Hlt() and guest.vector() == vector
        assert guest.frame().error == error and guest.frame().cs == CODE32


def test_a_more_privileged_level(any_host: Any) -> None:
    """From ring 3 the stack is the TSS's, and the frame has the old one."""
    with ProtectedGuest(any_host, UD2, user=True) as guest:
        assert guest.run() == Hlt() and guest.vector() == 6
        assert guest.frame()[:6] == (None, CODE, USER_CODE, 2 | RF, USER_STACK, USER_DATA)
        sregs = guest.vcpu.get_sregs()
        assert (guest.regs().rsp, sregs.ss.selector, sregs.ss.dpl, sregs.cs.selector) == (STACK - 20, DATA32, 0, CODE32)


def test_back_to_ring_3(any_host: Any) -> None:
    """The handler skips UD2 and returns; ring 3 goes on, and its HLT is #GP."""
    with ProtectedGuest(any_host, code("0f0bbb4d 000000f4", "ud2; mov ebx, 77; hlt", 32), user=True) as guest:
        needs_exact(guest)
        guest.put(0x18000, code("83042402 41cf", "add dword ptr [esp], 2; inc ecx; iretd", 32))
        guest.set_gate(6, 0x18000)
        guest.regs(rcx=0)
        assert guest.run() == Hlt() and guest.vector() == 13
        assert (guest.regs().rbx, guest.regs().rcx) == (77, 1)
        assert guest.frame()[:6] == (0, CODE + 7, USER_CODE, 2 | RF, USER_STACK, USER_DATA)


@pytest.mark.parametrize("user", [False, True], ids=["ring 0", "ring 3"])
def test_conforming_code_keeps_the_level(any_host: Any, user: bool) -> None:
    with ProtectedGuest(any_host, UD2, user=user) as guest:
        needs_exact(guest)
        guest.set_gate(6, 0x18000, CONFORMING)
        guest.put(0x18000, code("8ccb89e1 f4", "mov ebx, cs; mov ecx, esp; hlt", 32))
        assert guest.run() == Hlt()
        level = 3 if user else 0
        assert (guest.regs().rbx, guest.regs().rcx) == (CONFORMING | level, (USER_STACK if user else STACK) - 12)
        assert user == (guest.vector() == 13), "HLT in ring 3"


@pytest.mark.parametrize("kind", [INTERRUPT16, TRAP16])
def test_16_bit_gates_push_words(any_host: Any, kind: int) -> None:
    with ProtectedGuest(any_host, code("66b87000 8ed8", "mov ax, 0x70; mov ds, ax", 32)) as guest:
        needs_exact(guest)
        guest.set_gate(13, 0x9000, CODE16, kind)
        guest.put(0x9000, b"\xf4")
        assert guest.run() == Hlt() and guest.regs().rip == 0x9001
        assert guest.frame(2, vector=13)[:4] == (0x70, (CODE + 4) & 0xFFFF, CODE32, 2) and guest.regs().rsp == STACK - 8


def test_a_small_stack(any_host: Any) -> None:
    """B clear: SP is pushed on, the upper half of ESP stays."""
    with ProtectedGuest(any_host, code("66b83800 8ed0bc04 5034120f 0b", "mov ax, 0x38; mov ss, ax; mov esp, 0x12345004; ud2", 32)) as guest:
        needs_exact(guest)
        assert guest.run() == Hlt() and guest.vector() == 6
        assert guest.regs().rsp == 0x12344FF8
        assert struct.unpack("<3I", guest.get(0x4FF8, 12)) == (CODE + 11, CODE32, 2 | RF)


def test_a_stack_with_a_base(any_host: Any) -> None:
    with ProtectedGuest(any_host, UD2, user=True) as guest:
        needs_exact(guest)
        guest.set_descriptor(SPARE, segment_descriptor(0x30000, 0xFFFFF, 0x93, 12))
        guest.put(TSS + 4, struct.pack("<II", 0x800, SPARE))
        assert guest.run() == Hlt() and guest.vector() == 6
        assert guest.regs().rsp == 0x800 - 20 and guest.frame(base=0x30000)[:3] == (None, CODE, USER_CODE)


def test_the_16_bit_tss(any_host: Any) -> None:
    with ProtectedGuest(any_host, UD2, user=True) as guest:
        needs_exact(guest)
        guest.set_descriptor(TSS_SELECTOR, segment_descriptor(TSS, 43, 0x81, 0))
        guest.put(TSS, struct.pack("<HHH", 0, 0x8800, DATA32))
        assert guest.run() == Hlt() and guest.vector() == 6
        assert guest.regs().rsp == 0x8800 - 20
        assert guest.frame()[:6] == (None, CODE, USER_CODE, 2 | RF, USER_STACK, USER_DATA)


# ---- deliveries that fail: what comes instead, with which error code
def broken(guest: ProtectedGuest, what: str) -> None:
    """Break the way of vector 0x21 (software) or 6 (a fault)."""
    for vector in (6, 0x21):
        entry = STUBS + 16 * vector
        {
            "not present": lambda v=vector, e=entry: guest.set_gate(v, e, present=False),
            "wrong type": lambda v=vector, e=entry: guest.set_gate(v, e, kind=12),
            "null selector": lambda v=vector, e=entry: guest.set_gate(v, e, 0),
            "selector past the table": lambda v=vector, e=entry: guest.set_gate(v, e, 0x78),
            "data segment": lambda v=vector, e=entry: guest.set_gate(v, e, DATA32),
            "less privileged code": lambda v=vector, e=entry: guest.set_gate(v, e, USER_CODE),
            "absent code": lambda v=vector, e=entry: guest.set_gate(v, e, ABSENT_CODE),
            "entry past the limit": lambda v=vector: guest.set_gate(v, 0x20000, CODE16),
            "privileged gate": lambda v=vector, e=entry: guest.set_gate(v, e, dpl=0),
        }[what]()


EXT, IN_IDT = 1, 2
FAILURES = [
    ("not present", 11, -1), ("wrong type", 13, -1), ("null selector", 13, 0), ("selector past the table", 13, 0x78),
    ("data segment", 13, DATA32), ("less privileged code", 13, USER_CODE & ~3), ("absent code", 11, ABSENT_CODE),
    ("entry past the limit", 13, 0),
]  # fmt: skip


@pytest.mark.parametrize(("what", "vector", "error"), FAILURES, ids=[row[0] for row in FAILURES])
@pytest.mark.parametrize("software", [False, True], ids=["fault", "int n"])
def test_a_delivery_that_fails(any_host: Any, what: str, vector: int, error: int, software: bool) -> None:
    """EXT says whether the program asked for the event; the frame of what comes instead points at the instruction."""
    with ProtectedGuest(any_host, INT21 if software else UD2) as guest:
        needs_exact(guest)
        if what == "entry past the limit" and not feature(guest, "an exact CPU"):
            pytest.skip("the lab's CPU does not look at the limit of a code segment")
        broken(guest, what)
        assert guest.run() == Hlt() and guest.vector() == vector
        asked = (0x21 if software else 6) * 8 + IN_IDT if error < 0 else error
        exact = feature(guest, "an exact CPU")
        assert guest.frame().error == asked | (EXT if exact and not software else 0), "the lab's CPU knows no EXT"
        assert guest.frame().eip == CODE + (0 if exact or not software else 2) and guest.frame().cs == CODE32


def test_a_gate_that_ring_3_may_not_use(any_host: Any) -> None:
    with ProtectedGuest(any_host, INT21, user=True) as guest:
        needs_exact(guest)
        broken(guest, "privileged gate")
        assert guest.run() == Hlt() and guest.vector() == 13
        assert guest.frame().error == 0x21 * 8 + IN_IDT and guest.frame().cs == USER_CODE
        assert guest.frame().eip == CODE + (0 if feature(guest, "an exact CPU") else 2)


STACKS = [
    ("null", lambda guest: guest.put(TSS + 8, bytes(4)), 10, 0),
    ("of ring 3", lambda guest: guest.put(TSS + 8, struct.pack("<I", USER_DATA)), 10, USER_DATA & ~3),
    ("with a wrong RPL", lambda guest: guest.put(TSS + 8, struct.pack("<I", DATA32 | 1)), 10, DATA32),
    ("code", lambda guest: guest.put(TSS + 8, struct.pack("<I", CODE32)), 10, CODE32),
    ("read-only", lambda guest: guest.set_descriptor(DATA32, segment_descriptor(0, 0xFFFFF, 0x91, 12)), 10, DATA32),
    ("absent", lambda guest: guest.put(TSS + 8, struct.pack("<I", ABSENT_DATA)), 12, ABSENT_DATA),
    ("past the table", lambda guest: guest.put(TSS + 8, struct.pack("<I", 0x78)), 10, 0x78),
    ("too small", lambda guest: guest.put(TSS + 4, struct.pack("<II", 0x10, DATA32)), 12, DATA32),
]


@pytest.mark.parametrize(("what", "breaks", "vector", "error"), STACKS, ids=[row[0] for row in STACKS])
def test_a_stack_that_cannot_be(any_host: Any, what: str, breaks: Any, vector: int, error: int) -> None:
    """#TS and #SS come from the same TSS, so their handler is conforming code, which needs no other stack."""
    with ProtectedGuest(any_host, UD2, user=True) as guest:
        needs_exact(guest)
        exact = feature(guest, "an exact CPU")
        if not exact and what in ("absent", "too small"):
            pytest.skip("the lab's CPU raises #TS for a stack that is absent, and does not look at the limit of one")
        if what == "too small":
            guest.set_descriptor(DATA32, segment_descriptor(0, 0xF, 0x93, 4))
        breaks(guest)
        for number in (10, 12):
            guest.set_gate(number, 0x18000 + 16 * number, CONFORMING)
            guest.put(0x18000 + 16 * number, bytes((0xB0, number)) + code("5be610", "pop ebx; out 0x10, al", 32))
        guest.regs(rflags=2 | IOPL3)
        assert guest.run() == Io(0x10, 1, 1, True, bytes((vector,)), PAGE)
        assert guest.regs().rbx == error | (EXT if exact else 0)


def test_double_fault(any_host: Any) -> None:
    with ProtectedGuest(any_host, code("b9bc0a00 400f32", "mov ecx, 0x40000abc; rdmsr", 32)) as guest:
        if not feature(guest, "an exact CPU"):
            pytest.skip("the lab's CPU delivers #NP where #DF is due, see docs/fidelity.md")
        guest.set_gate(13, STUBS, present=False)
        assert guest.run() == Hlt() and guest.vector() == 8 and guest.frame().error == 0


def test_triple_fault(any_host: Any) -> None:
    with ProtectedGuest(any_host, code("b9bc0a00 400f32", "mov ecx, 0x40000abc; rdmsr", 32)) as guest:
        for vector in (8, 11, 13):
            guest.set_gate(vector, STUBS, present=False)
        assert guest.run() == Shutdown()


# ---- virtual-8086 mode
def test_virtual_8086_mode_and_back(any_host: Any) -> None:
    """IRET enters it; the first fault pushes the data segments, which are null in the handler."""
    enter = code(
        "6a146a13 6a126a11 68003000 00680008 00006802 30020068 00100000 68000100 00cf",
        "push 0x14; push 0x13; push 0x12; push 0x11; push 0x3000; push 0x800; push 0x23002; push 0x1000; push 0x100; iretd",
        32,
    )
    with ProtectedGuest(any_host, enter) as guest:
        needs_exact(guest)
        guest.put(0x10100, code("b834120f 0b", "mov ax, 0x1234; ud2", 16))
        assert guest.run() == Hlt() and guest.vector() == 6
        assert guest.regs().rax & 0xFFFF == 0x1234
        expected = Frame32(None, 0x103, 0x1000, 0, 0x800, 0x3000, 0x11, 0x12, 0x13, 0x14)
        frame = guest.frame()
        assert frame._replace(eflags=0) == expected and frame.eflags & (VM | IOPL3) == VM | IOPL3
        sregs = guest.vcpu.get_sregs()
        assert [getattr(sregs, name).selector for name in ("ds", "es", "fs", "gs")] == [0] * 4
        assert not guest.regs().rflags & VM and sregs.ss.selector == DATA32 and guest.regs().rsp == STACK - 36


TASK_STATE = struct.pack(
    "<8I2I8I6I2I", 0, 0, 0, 0, 0, 0, 0, 0, 0x18000, 2, 0xA0, 0xA1, 0xA2, 0xA3, 0x2F000, 0xA5, 0xA6, 0xA7,
    DATA32, CODE32, DATA32, DATA32, 0, 0, 0, 0,
)  # fmt: skip


def check_task_switch(guest: ProtectedGuest, eip: int) -> None:
    """The second task runs and has a link to the first, whose state is in its TSS."""
    regs, sregs = guest.regs(), guest.vcpu.get_sregs()
    assert (regs.rip, regs.rax, regs.rbx) == (0x18001, 0xA0, 0xA3)
    assert sregs.tr.selector == TASK and sregs.cr0 & 8 and regs.rflags & 1 << 14
    assert guest.get(TASK_TSS, 2) == struct.pack("<H", TSS_SELECTOR) and guest.get(GDT + TASK + 5, 1) == b"\x8b"
    assert struct.unpack("<I", guest.get(TSS + 0x20, 4)) == (eip,) and guest.get(TSS + 0x34, 4) == struct.pack("<I", 0x1234)


def test_a_task_gate(any_host: Any) -> None:
    """INT through a task gate, and back by IRET."""
    with ProtectedGuest(any_host, code("cd21b905 000000f4", "int 0x21; mov ecx, 5; hlt", 32)) as guest:
        needs_exact(guest)
        guest.set_gate(0x21, 0, TASK, TASK_GATE)
        guest.put(TASK_TSS, TASK_STATE)
        guest.put(0x18000, code("f4cf", "hlt; iretd", 32))
        guest.regs(rbx=0x1234)
        assert guest.run() == Hlt()
        check_task_switch(guest, CODE + 2)
        assert guest.regs().rsp == 0x2F000
        assert guest.run() == Hlt()
        regs = guest.regs()
        assert (regs.rcx, regs.rbx, regs.rsp) == (5, 0x1234, STACK) and guest.vcpu.get_sregs().tr.selector == TSS_SELECTOR


def test_a_task_gate_for_a_fault(any_host: Any) -> None:
    """The error code is pushed on the new task's stack, and the old one is left on the instruction."""
    with ProtectedGuest(any_host, code("b9bc0a00 400f32", "mov ecx, 0x40000abc; rdmsr", 32)) as guest:
        if not feature(guest, "the model"):
            pytest.skip("KVM emulates this switch, and refuses it in the lab: #DF, see docs/fidelity.md")
        guest.set_gate(13, 0, TASK, TASK_GATE)
        guest.put(TASK_TSS, TASK_STATE)
        guest.put(0x18000, b"\xf4")
        guest.regs(rbx=0x1234)
        assert guest.run() == Hlt()
        check_task_switch(guest, CODE + 5)
        assert guest.regs().rsp == 0x2F000 - 4 and guest.get(0x2F000 - 4, 4) == bytes(4)


@pytest.mark.parametrize(("value", "vector"), [(0x78, 10), (CODE32 | 3, 10), (ABSENT_DATA, 11)])
def test_a_task_with_a_wrong_segment(any_host: Any, value: int, vector: int) -> None:
    """A wrong DS in the new task's TSS is a fault of the new task: its handler's frame has that task's flags (NT)."""
    with ProtectedGuest(any_host, code("cd21", "int 0x21", 32)) as guest:
        if not feature(guest, "the model"):
            pytest.skip("a paravirtual KVM has no INT n, and KVM's emulation checks less")
        guest.set_gate(0x21, 0, TASK, TASK_GATE)
        guest.put(TASK_TSS, TASK_STATE[:0x54] + struct.pack("<H", value) + TASK_STATE[0x56:])
        assert guest.run() == Hlt() and guest.vector() == vector
        assert guest.frame().error == value & ~3 and guest.frame().eflags & 1 << 14 and guest.frame().eip == 0x18000


def test_a_task_without_a_stack(any_host: Any) -> None:
    with ProtectedGuest(any_host, code("cd21", "int 0x21", 32)) as guest:
        if not feature(guest, "the model"):
            pytest.skip("a paravirtual KVM has no INT n, and KVM's emulation checks less")
        guest.set_gate(0x21, 0, TASK, TASK_GATE)
        guest.put(TASK_TSS, TASK_STATE[:0x50] + bytes(4) + TASK_STATE[0x54:])
        assert guest.run() == Shutdown()
