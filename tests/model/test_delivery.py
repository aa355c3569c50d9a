"""Delivery of exceptions and interrupts on the model: 64-bit gates, the IST, real mode's stack, and which two faults
make a double fault. Protected mode's are in tests/conformance/test_protected.py.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kvmapi.exits import Hlt, Shutdown
from tests.conformance.protected import ProtectedGuest
from tests.conformance.snippets import (
    CODE,
    HOLE,
    IDT,
    REAL_CODE,
    STACK,
    STUBS,
    TSS,
    LongGuest,
    RealGuest,
    code,
)  # fmt: skip

pytestmark = pytest.mark.model
RF, EXT = 1 << 16, 1
UD2, INT13, GP_FAULT = code("0f0b", "ud2"), code("cd0d", "int 13"), code("b9bc0a00 400f32", "mov ecx, 0x40000abc; rdmsr")
DIVIDE, PAGE_FAULT = code("31c9f7f1", "xor ecx, ecx; div ecx"), code("8a042500 00e03f", "mov al, [0x3fe00000]")


def gate(guest: LongGuest, vector: int, entry: int, *, selector: int = 8, kind: int = 0x8E, ist: int = 0) -> None:
    guest.put(IDT + 16 * vector, struct.pack("<HHBBHII", entry & 0xFFFF, selector, ist, kind, entry >> 16 & 0xFFFF, entry >> 32, 0))


# ---- software interrupts
def test_int_pushes_no_error_code(model_host: Any) -> None:
    """INT 13 is not #GP."""
    with LongGuest(model_host, INT13) as guest:
        assert guest.run() == Hlt() and guest.vector() == 13
        assert struct.unpack("<5Q", guest.get(guest.regs().rsp, 40)) == (CODE + 2, 8, 2, STACK, 0x10)


@pytest.mark.parametrize(("text", "vector"), [(code("cd14", "int 0x14"), 20), (code("cc", "int3"), 3), (code("cc", "int 3"), 3)])
def test_a_software_interrupt_that_cannot_be_delivered(model_host: Any, text: bytes, vector: int) -> None:
    """The fault's frame points at the instruction; EXT is clear, since the program asked."""
    with LongGuest(model_host, b"\x90" + text) as guest:
        gate(guest, vector, STUBS, kind=0x0E)
        assert guest.run() == Hlt() and guest.vector() == 11
        assert guest.frame()[:2] == (vector * 8 + 2, CODE + 1) and guest.frame().rflags == 2 | RF


def test_int_6_is_not_an_invalid_opcode(model_host: Any) -> None:
    """The engine takes it for one: the frame points behind it, without RF; a gate of the kernel's is #GP in ring 3."""
    with LongGuest(model_host, code("cd06", "int 6")) as guest:
        assert guest.run() == Hlt() and guest.vector() == 6
        assert guest.frame().rip == CODE + 2 and guest.frame().rflags == 2
    with ProtectedGuest(model_host, code("cd06", "int 6", 32), user=True) as guest32:
        guest32.set_gate(6, STUBS + 96, dpl=0)
        assert guest32.run() == Hlt() and guest32.vector() == 13 and guest32.frame()[:2] == (6 * 8 + 2, CODE)


def test_contributory_software_interrupts_are_none(model_host: Any) -> None:
    """INT 13 whose gate is absent is #NP, not #DF."""
    with LongGuest(model_host, INT13) as guest:
        guest.set_gate(13, 0)
        assert guest.run() == Hlt() and guest.vector() == 11 and guest.frame().error == 13 * 8 + 2


# ---- 64-bit gates
BAD_GATES = [
    ("16-bit", {"kind": 0x86}, 13, 6 * 8 + 2 | EXT), ("task", {"kind": 0x85}, 13, 6 * 8 + 2 | EXT),
    ("not present", {"kind": 0x0E}, 11, 6 * 8 + 2 | EXT), ("null", {"selector": 0}, 13, EXT), ("data", {"selector": 0x10}, 13, 0x10 | EXT),
    ("past the table", {"selector": 0x28}, 13, 0x28 | EXT), ("32-bit code", {"selector": 0x20}, 13, 0x20 | EXT),
    ("not canonical", {"entry": 1 << 47}, 13, EXT),
]  # fmt: skip


@pytest.mark.parametrize(("what", "change", "vector", "error"), BAD_GATES, ids=[row[0] for row in BAD_GATES])
def test_gates_that_are_refused(model_host: Any, what: str, change: dict[str, int], vector: int, error: int) -> None:
    with LongGuest(model_host, UD2) as guest:
        guest.put(0x6020, struct.pack("<Q", 0x00CF9B000000FFFF))
        gate(guest, 6, **{"entry": STUBS + 96, **change})
        assert guest.run() == Hlt() and (guest.vector(), guest.frame().error) == (vector, error)
        assert guest.frame().rip == CODE


@pytest.mark.parametrize("flags", [0x00EF9B000000FFFF, 0x00AF1B000000FFFF, 0x00AFFB000000FFFF])
def test_code_segments_that_are_refused(model_host: Any, flags: int) -> None:
    """L with D, not present, and less privileged."""
    with LongGuest(model_host, UD2) as guest:
        guest.put(0x6020, struct.pack("<Q", flags))
        gate(guest, 6, STUBS + 96, selector=0x20)
        assert guest.run() == Hlt() and guest.frame().error == 0x20 | EXT
        assert guest.vector() == (13 if flags >> 47 & 1 else 11)


def test_the_interrupt_stack_table(model_host: Any) -> None:
    """IST without a change of level: another stack, the same SS; aligned to 16 bytes."""
    with LongGuest(model_host, UD2) as guest:
        gate(guest, 6, STUBS + 96, ist=7)
        guest.put(TSS + 0x24 + 48, struct.pack("<Q", 0x1F00B))
        assert guest.run() == Hlt() and guest.vector() == 6
        assert guest.regs().rsp == 0x1F000 - 40 and guest.frame().rsp == STACK and guest.vcpu.get_sregs().ss.selector == 0x10


def test_stacks_that_are_not_canonical(model_host: Any) -> None:
    """#SS, by the IST or with the RSP that code had."""
    for by_ist in (True, False):
        with LongGuest(model_host, code("4889c40f 0b", "mov rsp, rax; ud2")) as guest:
            gate(guest, 6, STUBS + 96, ist=1 if by_ist else 0)
            gate(guest, 12, STUBS + 192, ist=2)
            guest.put(TSS + 0x24, struct.pack("<QQ", 1 << 47, 0x1F000))
            guest.regs(rax=0x18000 if by_ist else (1 << 47) + 0x1000)
            assert guest.run() == Hlt() and guest.vector() == 12 and guest.frame().error == EXT


def test_a_tss_that_is_too_small(model_host: Any) -> None:
    with LongGuest(model_host, UD2) as guest:
        sregs = guest.vcpu.get_sregs()
        sregs.tr.limit = 0x2A
        guest.vcpu.set_sregs(sregs)
        gate(guest, 6, STUBS + 96, ist=1)
        assert guest.run() == Hlt() and guest.vector() == 10 and guest.frame().error == 0x18 | EXT


def test_the_accessed_bit_of_the_handlers_code(model_host: Any) -> None:
    with LongGuest(model_host, UD2) as guest:
        guest.put(0x6008 + 5, b"\x9a")
        assert guest.run() == Hlt() and guest.vector() == 6
        assert guest.get(0x6008 + 5, 1) == b"\x9b" and guest.vcpu.get_sregs().cs.type == 0xB


# ---- two faults
BENIGN, CONTRIBUTORY, PAGE = ("benign", UD2, 6), ("contributory", GP_FAULT, 13), ("page", PAGE_FAULT, 14)


def broken(guest: LongGuest, vector: int, how: str) -> None:
    """The gate of `vector` leads to a fault of that class."""
    if how == "contributory":
        guest.set_gate(vector, 0)
    else:  # its stack is on a page that is not present
        gate(guest, vector, STUBS + 16 * vector, ist=1)
        guest.put(TSS + 0x24, struct.pack("<Q", HOLE + 0x1000))


@pytest.mark.parametrize(("first", "second", "expected"), [
    (BENIGN, "contributory", 11), (BENIGN, "page", 14), (CONTRIBUTORY, "contributory", 8), (CONTRIBUTORY, "page", 14),
    (PAGE, "contributory", 8), (PAGE, "page", 8), (("divide", DIVIDE, 0), "contributory", 8),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_which_two_faults_make_a_double_fault(model_host: Any, first: tuple[str, bytes, int], second: str, expected: int) -> None:
    _, text, vector = first
    with LongGuest(model_host, text) as guest:
        broken(guest, vector, second)
        assert guest.run() == Hlt() and guest.vector() == expected
        if expected == 8:
            assert guest.frame().error == 0
        elif expected == 11:
            assert guest.frame().error == vector * 8 + 2 | EXT
        else:
            assert guest.vcpu.get_sregs().cr2 in range(HOLE, HOLE + 0x1000) and guest.frame().error == 2


@pytest.mark.parametrize("how", ["contributory", "page"])
def test_a_fault_while_a_double_fault_is_delivered(model_host: Any, how: str) -> None:
    with LongGuest(model_host, GP_FAULT) as guest:
        guest.set_gate(13, 0)
        guest.set_gate(11, 0)
        broken(guest, 8, how)
        assert guest.run() == Shutdown()


def test_a_double_fault_from_user_space(model_host: Any) -> None:
    """KVM_SET_VCPU_EVENTS injects #DF, whose gate is absent: shutdown at once, no second try."""
    with LongGuest(model_host, UD2) as guest:
        guest.set_gate(8, 0)
        events = guest.vcpu.get_vcpu_events()
        events.exception.injected, events.exception.nr, events.exception.has_error_code = 1, 8, 1
        guest.vcpu.set_vcpu_events(events)
        assert guest.run() == Shutdown()


# ---- interrupts from outside, in protected mode
def test_an_interrupt_in_protected_mode(model_host: Any) -> None:
    for user in (False, True):
        with ProtectedGuest(model_host, code("ebfe", "0: jmp 0b", 32), user=user) as guest:
            guest.regs(rip=CODE) if not user else None
            guest.vcpu.interrupt(0x55)
            assert guest.run() == Hlt() and guest.vector() == 0x55
            assert not guest.frame().eflags & RF


def test_an_interrupt_whose_gate_is_absent(model_host: Any) -> None:
    with ProtectedGuest(model_host, code("ebfe", "0: jmp 0b", 32)) as guest:
        guest.set_gate(0x55, 0, present=False)
        guest.vcpu.interrupt(0x55)
        assert guest.run() == Hlt() and guest.vector() == 11 and guest.frame().error == 0x55 * 8 + 2 | EXT


def test_an_interrupt_numbered_as_a_fault_is_none(model_host: Any) -> None:
    """Vector 13 from outside: no error code, and no double fault when it fails."""
    with LongGuest(model_host, code("ebfe", "0: jmp 0b")) as guest:
        guest.set_gate(13, 0)
        guest.vcpu.interrupt(13)
        assert guest.run() == Hlt() and guest.vector() == 11 and guest.frame().error == 13 * 8 + 2 | EXT


# ---- real mode
def test_the_real_mode_stack_wraps(model_host: Any) -> None:
    with RealGuest(model_host, code("bc020031 c9f7f1", "mov sp, 2; xor cx, cx; div cx", 16)) as guest:
        sregs = guest.vcpu.get_sregs()
        sregs.ss.base, sregs.ss.selector = 0x30000, 0x3000
        guest.vcpu.set_sregs(sregs)
        assert guest.run() == Hlt() and guest.vector() == 0 and guest.regs().rsp & 0xFFFF == 0xFFFC
        assert guest.get(0x3FFFC, 4) == struct.pack("<HH", REAL_CODE + 5, 0) and guest.get(0x40000, 8) == bytes(8)


def test_a_stack_that_splits_a_word_shuts_down(model_host: Any) -> None:
    """#SS cannot be delivered there either, nor can #DF."""
    with RealGuest(model_host, code("bc030031 c9f7f1", "mov sp, 3; xor cx, cx; div cx", 16)) as guest:
        assert guest.run() == Shutdown()


@pytest.mark.parametrize(("limit", "vector"), [(0x3FF, 0x40), (0x40 * 4 + 2, 13), (13 * 4 + 2, 8), (8 * 4 + 2, None)])
def test_the_limit_of_the_vector_table(model_host: Any, limit: int, vector: int | None) -> None:
    with RealGuest(model_host, code("cd40", "int 0x40", 16)) as guest:
        sregs = guest.vcpu.get_sregs()
        sregs.idt.limit = limit
        guest.vcpu.set_sregs(sregs)
        exit = guest.run()
        assert exit == (Shutdown() if vector is None else Hlt())
        if vector is not None:
            assert guest.vector() == vector
            ip = int.from_bytes(guest.get(guest.regs().rsp, 2), "little")
            assert ip == REAL_CODE + (2 if vector == 0x40 else 0)
