"""Exceptions reach the guest's IDT as the processor delivers them: vector, error code, frame, CR2; and go back.

A paravirtual kernel (no SVM, no VMX) emulates or bounces what hardware delivers, and the lab's CPU has limits of its
own: `LACKS` says which tests that is. Protected mode is in test_protected.py, rings in test_rings.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from kvmapi.exits import Hlt, Shutdown
from tests.conformance.rows import feature
from tests.conformance.snippets import ALIAS, CODE, HOLE, PD_ALIAS, STACK, Frame, LongGuest, RealGuest, code

RF = 1 << 16
NOT_CANONICAL = 0x0000_8000_0000_0000
CASES = [
    ("ud2", code("0f0b", "ud2"), 6, None),
    ("div by zero", code("31c9f7f1", "xor ecx, ecx; div ecx"), 0, None),
    ("idiv overflow", code("ba020000 00b90100 0000f7f9", "mov edx, 2; mov ecx, 1; idiv ecx"), 0, None),
    ("unknown msr", code("b9bc0a00 400f32", "mov ecx, 0x40000abc; rdmsr"), 13, 0),
    ("load of a bad selector", code("66b87000 8ed8", "mov ax, 0x70; mov ds, ax"), 13, 0x70),
    ("load from a non-canonical address", code("48bb0000 00000080 00008a03", "mov rbx, 0x800000000000; mov al, [rbx]"), 13, 0),
    ("jump to a non-canonical address", code("48bb0000 00000080 0000ffe3", "mov rbx, 0x800000000000; jmp rbx"), 13, 0),
    ("read of a page that is not present", code("8a042500 00e03f", "mov al, [0x3fe00000]"), 14, 0),
    ("write", code("88042500 00e03f", "mov [0x3fe00000], al"), 14, 2),
    ("fetch", code("b80000e0 3fffe0", "mov eax, 0x3fe00000; jmp rax"), 14, 0x10),
    ("int3", code("cc", "int3"), 3, None),
    ("int 0x14", code("cd14", "int 0x14"), 20, None),
    ("wrong CR4", code("0f20e048 0fbae81f 0f22e0", "mov rax, cr4; bts rax, 31; mov cr4, rax"), 13, 0),
    ("wrong CR0", code("48b81000 00800000 00000f22 c0", "mov rax, 0x80000010; mov cr0, rax"), 13, 0),
]  # fmt: skip


LACKS = {
    "model": set[str](),
    "paravirtual": {"int3", "int 0x14", "missing gate"},  # INT n: INTERNAL_ERROR; #NP while delivering: #DF
    # QEMU's TCG: frames of faults without RF, #PF of a reserved bit without P, #NP where #DF is due, vector * 16 + 2 in gates' error codes
    "the lab's CPU": {"RF", "reserved bits", "double fault", "missing gate"},
}


def lack(guest: LongGuest, name: str) -> None:
    """Skip what this host is known to lack."""
    probes = {"model": "the model", "paravirtual": "hardware virtualization", "the lab's CPU": "an exact CPU"}
    for who, probe in probes.items():
        here = feature(guest, probe) == (who == "model")
        if here and name in LACKS[who]:
            pytest.skip(f"{who}: {name} is a known difference, see docs/fidelity.md")


@pytest.mark.parametrize(("name", "text", "vector", "error"), CASES, ids=lambda v: str(v)[:40])
def test_vector_and_error_code(any_host: Any, name: str, text: bytes, vector: int, error: int | None) -> None:
    with LongGuest(any_host, text) as guest:
        lack(guest, name)
        assert guest.run() == Hlt()
        assert (guest.vector(), guest.frame().error) == (vector, error)


def test_frame(any_host: Any) -> None:
    with LongGuest(any_host, code("908a0425 2301e03f", "nop; mov al, [0x3fe00123]")) as guest:
        guest.regs(rflags=0x246)
        assert guest.run() == Hlt()
        rf = RF if feature(guest, "an exact CPU") else 0
        assert guest.frame() == Frame(0, CODE + 1, 8, 0x246 | rf, STACK, 0x10)
        assert guest.vcpu.get_sregs().cr2 == HOLE + 0x123
        assert guest.regs().rsp == STACK - 48 and not guest.regs().rflags & 0x200, "an interrupt gate clears IF"


def test_traps_point_behind_themselves_and_have_no_rf(any_host: Any) -> None:
    with LongGuest(any_host, code("cc", "int3")) as guest:
        lack(guest, "int3")
        assert guest.run() == Hlt()
        assert guest.frame() == Frame(None, CODE + 1, 8, 2, STACK, 0x10)


def test_the_stack_is_aligned_for_a_frame(any_host: Any) -> None:
    with LongGuest(any_host, code("0f0b", "ud2")) as guest:
        guest.regs(rsp=STACK - 3)
        assert guest.run() == Hlt()
        assert guest.regs().rsp == STACK - 16 - 40 and guest.frame().rsp == STACK - 3


def test_page_protection(any_host: Any) -> None:
    """A read-only page: CR0.WP decides; the error code says present and write. NX: present and fetch."""
    with LongGuest(any_host, code("48c7c300 0000408a 038803f4", "mov rbx, 0x40000000; mov al, [rbx]; mov [rbx], al; hlt")) as guest:
        guest.put(PD_ALIAS, (0x81).to_bytes(8, "little"))
        assert guest.run() == Hlt() and guest.vector() == 14
        assert guest.frame().error == 3 and guest.vcpu.get_sregs().cr2 == ALIAS
        sregs = guest.vcpu.get_sregs()
        sregs.cr0 &= ~(1 << 16)
        guest.vcpu.set_sregs(sregs)
        assert guest.again() == Hlt() and guest.regs().rip < 0x20000 and guest.regs().rip > CODE, "without WP the store goes through"
    with LongGuest(any_host, code("48c7c310 000140ff e3909090 90f4", "mov rbx, 0x40010010; jmp rbx; nop; nop; nop; nop; hlt")) as guest:
        guest.put(CODE + 16, b"\xf4")
        guest.put(PD_ALIAS, (0x83 | 1 << 63).to_bytes(8, "little"))
        assert guest.run() == Hlt() and guest.vector() == 14 and guest.frame().error == 0x11


def test_reserved_bits(any_host: Any) -> None:
    with LongGuest(any_host, code("48c7c300 0000408a 03f4", "mov rbx, 0x40000000; mov al, [rbx]; hlt")) as guest:
        lack(guest, "reserved bits")
        guest.put(PD_ALIAS, (0x83 | 1 << 13).to_bytes(8, "little"))  # an address bit below 2 MiB
        assert guest.run() == Hlt() and guest.vector() == 14 and guest.frame().error == 9


def test_handlers_return(any_host: Any) -> None:
    """#UD handler at 0x18000 skips the two bytes of ud2 and returns; the code behind it runs."""
    with LongGuest(any_host, code("0f0bbb4d 0000000f 0bf4", "ud2; mov ebx, 77; ud2; hlt")) as guest:
        guest.put(0x18000, code("48830424 02ffc148 cf", "add qword ptr [rsp], 2; inc ecx; iretq"))
        guest.set_gate(6, 0x18000)
        guest.regs(rcx=0)
        assert guest.run() == Hlt()
        assert (guest.regs().rbx, guest.regs().rcx, guest.regs().rsp) == (77, 2, STACK)


def test_accessed_and_dirty(any_host: Any) -> None:
    with LongGuest(
        any_host,
        code("48c7c300 0020408a 0348c7c3 00004040 8803f4", "mov rbx, 0x40200000; mov al, [rbx]; mov rbx, 0x40400000; mov [rbx], al; hlt"),
        size=8 << 20,
    ) as guest:
        assert guest.run() == Hlt()
        entries = [int.from_bytes(guest.get(PD_ALIAS + 8 * n, 8), "little") & 0x60 for n in (1, 2, 3)]
        assert entries == [0x20, 0x60, 0], "read: accessed; write: accessed and dirty; untouched: neither"


def test_double_fault(any_host: Any) -> None:
    """#NP while #UD... is delivered one after the other; #GP while #GP is delivered makes #DF with error code 0."""
    with LongGuest(any_host, code("b9bc0a00 400f32", "mov ecx, 0x40000abc; rdmsr")) as guest:
        lack(guest, "double fault")
        guest.set_gate(13, 0)
        assert guest.run() == Hlt() and guest.vector() == 8 and guest.frame().error == 0


def test_a_missing_gate_for_a_benign_exception(any_host: Any) -> None:
    with LongGuest(any_host, code("0f0b", "ud2")) as guest:
        lack(guest, "missing gate")
        guest.set_gate(6, 0)
        assert guest.run() == Hlt() and guest.vector() == 11
        assert guest.frame().error in (6 * 8 + 2, 6 * 8 + 3)  # EXT is set on hardware


def test_triple_fault(any_host: Any) -> None:
    with LongGuest(any_host, code("b9bc0a00 400f32", "mov ecx, 0x40000abc; rdmsr")) as guest:
        for vector in (8, 11, 13):
            guest.set_gate(vector, 0)
        assert guest.run() == Shutdown()


def test_real_mode_vectors(any_host: Any) -> None:
    with RealGuest(any_host, code("31c9f7f1", "xor cx, cx; div cx", 16)) as guest:
        assert guest.run() == Hlt() and guest.vector() == 0
        assert guest.get(guest.regs().rsp, 2) == (0x1002).to_bytes(2, "little")
    with RealGuest(any_host, code("cd21", "int 0x21", 16)) as guest:
        assert guest.run() == Hlt() and guest.vector() == 0x21
