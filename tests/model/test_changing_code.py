"""Code that changes: by itself, by another vCPU, by the VMM, under two addresses, and in another width."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kvmapi.exits import Hlt, Io
from tests.conformance.paged import CODE32, CODE64, LONG, OTHER, TARGET, P, Paged, W
from tests.conformance.snippets import CODE, DATA, PAGE, REAL_CODE, LongGuest, RealGuest, code
from tests.model.test_cpu import together
from tests.model.test_shadow import watchdog

pytestmark = pytest.mark.model
HLT = b"\xf4"
FUNCTION, NEXT = 0x11000, 0x12000

# ---- code that changes

RETURNS_ONE = code("b8010000 00c3", "mov eax, 1; ret")
PATCH_NEXT = code("ffd389c6 c6430102 ffd3f4", "call rbx; mov esi, eax; mov byte ptr [rbx + 1], 2; call rbx; hlt")
PATCH_AND_RUN = code(
    "ffd389c6 c6450002 ffd389c7 c6430103 41ffd0f4",
    "call rbx; mov esi, eax; mov byte ptr [rbp], 2; call rbx; mov edi, eax; mov byte ptr [rbx + 1], 3; call r8; hlt",
)
SELF = code("880d0200 000090b0 0001c3ff c975f1f4", "0: mov byte ptr [rip + 2], cl; nop; mov al, 0; add ebx, eax; dec ecx; jnz 0b; hlt")
CALLS = code(
    "ffd389c6 c7070100 0000837f 080074fa ffd3f4",
    "call rbx; mov esi, eax; mov dword ptr [rdi], 1; 0: cmp dword ptr [rdi + 8], 0; je 0b; call rbx; hlt",
)
PATCHER = code(
    "833f0074 fb40882e c7470801 000000f4",
    "0: cmp dword ptr [rdi], 0; je 0b; mov byte ptr [rsi], bpl; mov dword ptr [rdi + 8], 1; hlt",
)
WIDTHS = code(
    "31c0ff1c 25000003 00ff1c25 08000300 ff1c2500 000300ff 1c250800 0300f4",
    "xor eax, eax; lcall [0x30000]; lcall [0x30008]; lcall [0x30000]; lcall [0x30008]; hlt",
)
OUT_10 = code("e610c3", "out 0x10, al; ret")
LEAVES = code(
    "ffd3ffd3 c6430120 ffd3c603 f4ffd3", "call rbx; call rbx; mov byte ptr [rbx + 1], 0x20; call rbx; mov byte ptr [rbx], 0xf4; call rbx"
)
OUT_WORD = code("9066eff4", "nop; out dx, eax; hlt", 16)
WIDE_CODE = code("4090cb", "inc eax; nop; retf", 32)


def test_an_instruction_changes_the_one_behind_it(model_host: Any) -> None:
    """In the same block, the same page: each pass runs what was stored a moment ago."""
    with LongGuest(model_host, SELF) as guest:
        assert guest.again(rcx=20, rbx=0, rax=0) == Hlt() and guest.regs().rbx == sum(range(1, 21))


@pytest.mark.parametrize(
    "at", [CODE + 0x800, FUNCTION, FUNCTION + PAGE - 1, FUNCTION + PAGE - 3], ids=["same page", "next", "across", "across 3"]
)
def test_a_function_is_patched(model_host: Any, at: int) -> None:
    """In the page of the code, in another, and across a page border, where the patched byte is on either side."""
    with LongGuest(model_host, PATCH_NEXT) as guest:
        guest.put(at, RETURNS_ONE)
        assert guest.again(rbx=at) == Hlt()
        assert (guest.regs().rsi, guest.regs().rax) == (1, 2)


def test_an_instruction_that_leaves_the_guest_becomes_another(model_host: Any) -> None:
    """The guest patches it: its operand, then its opcode."""
    with LongGuest(model_host, LEAVES) as guest:
        guest.put(FUNCTION, OUT_10)
        for port, exit_ in ((0x10, guest.again(rbx=FUNCTION)), (0x10, guest.run()), (0x20, guest.run())):
            assert isinstance(exit_, Io) and exit_.is_out and exit_.port == port
        assert guest.run() == Hlt()


def test_a_stop_in_code_of_another_width(model_host: Any) -> None:
    """The same bytes at the same address, 16 and 32 bits wide: the operand's size is another."""
    with RealGuest(model_host, OUT_WORD) as guest:
        for wide, size in ((0, 4), (1, 2), (0, 4)):
            sregs = guest.vcpu.get_sregs()
            sregs.cs.db = wide
            guest.vcpu.set_sregs(sregs)
            guest.regs(rip=REAL_CODE)
            exit_ = guest.run()
            assert isinstance(exit_, Io) and exit_.size == size


def test_code_with_two_addresses(model_host: Any) -> None:
    """Stored through one, executed through the other, and the other way round."""
    with Paged(model_host, LONG) as guest:
        guest.put(TARGET, RETURNS_ONE)
        with watchdog(guest):
            assert guest.program(PATCH_AND_RUN, rbx=guest.va, rbp=TARGET + 1, r8=TARGET) == Hlt()
        assert (guest.vector(), guest.regs().rsi, guest.regs().rdi, guest.regs().rax) == (None, 1, 2, 3)


def test_the_vmm_changes_code_that_has_two_addresses(model_host: Any) -> None:
    with Paged(model_host, LONG) as guest:
        for value in range(1, 6):
            guest.put(TARGET, b"\xb8" + bytes([value, 0, 0, 0]) + HLT)
            for at in (guest.va, TARGET):
                guest.start(guest.vcpu, at)
                assert guest.run() == Hlt() and guest.regs().rax == value
        guest.put(TARGET, code("e610f4", "out 0x10, al; hlt"))
        for at in (guest.va, TARGET):
            guest.start(guest.vcpu, at)
            assert isinstance(guest.run(), Io), "an instruction that needs the model, where none was"


@pytest.mark.parametrize("at", [FUNCTION, FUNCTION + PAGE - 1])
def test_another_vcpu_changes_code(model_host: Any, at: int) -> None:
    """With a handshake: the first vCPU executed the function, waits, and executes it again."""
    with LongGuest(model_host, CALLS, vcpus=2) as guest:
        guest.put(at, RETURNS_ONE)
        guest.put(0x18000, PATCHER)
        guest.regs(0, rbx=at, rdi=DATA)
        guest.regs(1, rip=0x18000, rdi=DATA, rsi=at + 1, rbp=9)
        with watchdog(guest):
            assert together(lambda: guest.run(0), lambda: guest.run(1)) == [Hlt(), Hlt()]
        assert (guest.regs(0).rsi, guest.regs(0).rax) == (1, 9)


def test_the_same_bytes_in_two_widths(model_host: Any) -> None:
    """40 is INC EAX in 32-bit code and a prefix in 64-bit code: a block of one width is none of the other."""
    with Paged(model_host, LONG) as guest:
        guest.put(FUNCTION, WIDE_CODE)
        guest.put(DATA, struct.pack("<IHxxIHxx", FUNCTION, CODE64, FUNCTION, CODE32))
        assert guest.program(WIDTHS) == Hlt() and guest.vector() is None
        assert guest.regs().rax == 2


def test_remapped_code_is_the_new_page(model_host: Any) -> None:
    """Other code at the same address: after INVLPG, what was translated for the old page is not run."""
    text = code(
        "ffd389c6 48892f0f 013bffd3 89c24889 0f0f013b ffd3f4",
        "call rbx; mov esi, eax; mov [rdi], rbp; invlpg [rbx]; call rbx; mov edx, eax; mov [rdi], rcx; invlpg [rbx]; call rbx; hlt",
    )
    with Paged(model_host, LONG) as guest:
        guest.put(TARGET, RETURNS_ONE)
        guest.put(OTHER, code("b8020000 00c3", "mov eax, 2; ret"))
        assert guest.program(text, rbx=guest.va, rdi=guest.at(1), rbp=OTHER | P | W, rcx=TARGET | P | W) == Hlt()
        assert (guest.vector(), guest.regs().rsi, guest.regs().rdx, guest.regs().rax) == (None, 1, 2, 1)
