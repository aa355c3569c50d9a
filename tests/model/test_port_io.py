"""Port I/O by rings that IOPL does not allow it: the TSS's permission bitmap; and every width and string form.

Rows that a kernel can judge run on both; what the lab's CPU or a paravirtual kernel gets wrong says so.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kvmapi.exits import Exit, Hlt, Io
from tests.conformance.protected import DATA32, USER_STACK, ProtectedGuest, segment_descriptor
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, DATA, PD_LOW, PDPT, PML4, TSS, LongGuest, RealGuest, code

BITMAP = TSS + 0x80  # where the TSS says that it begins; the TSS ends at 0x280
IOPL3 = 3 << 12
VM = 1 << 17


def allow(guest: ProtectedGuest, *ports: int) -> None:
    """Clear bits of the bitmap."""
    for port in ports:
        at = BITMAP + port // 8
        guest.put(at, bytes((guest.get(at, 1)[0] & ~(1 << port % 8),)))


def outcome(guest: ProtectedGuest, exit: Exit) -> str:
    """What came of an instruction: "io", or "#GP" with error code 0."""
    if isinstance(exit, Io):
        return "io"
    assert exit == Hlt() and guest.vector() == 13 and guest.frame().error == 0
    return "#GP"


BYTE, WORD, DWORD = code("ee", "out dx, al", 32), code("66ef", "out dx, ax", 32), code("ef", "out dx, eax", 32)


@pytest.mark.parametrize(("text", "size"), [(BYTE, 1), (WORD, 2), (DWORD, 4)])
@pytest.mark.parametrize("first", [0x10, 0x15, 0x17, 0x1E])
def test_every_port_of_an_access_must_be_allowed(any_host: Any, text: bytes, size: int, first: int) -> None:
    """Also where an access reaches into the bitmap's next byte."""
    for denied in [*range(size), None]:
        with ProtectedGuest(any_host, text, user=True) as guest:
            allow(guest, *(first + n for n in range(size) if n != denied))
            guest.regs(rdx=first)
            assert outcome(guest, guest.run()) == ("io" if denied is None else "#GP")


@pytest.mark.parametrize(
    ("text", "port"),
    [
        (code("e610", "out 0x10, al", 32), 0x10),
        (code("e410", "in al, 0x10", 32), 0x10),
        (code("ed", "in eax, dx", 32), 0x20),
        (code("6e", "outsb", 32), 0x20),
        (code("6d", "insd", 32), 0x20),
        (code("66f36f", "rep outsw", 32), 0x20),
        (code("f36c", "rep insb", 32), 0x20),
    ],
)
def test_all_instructions_ask_the_bitmap(any_host: Any, text: bytes, port: int) -> None:
    for allowed in (False, True):
        with ProtectedGuest(any_host, text, user=True) as guest:
            if allowed:
                allow(guest, *range(port, port + 4))
            guest.regs(rdx=0x20, rcx=1, rsi=DATA, rdi=DATA)
            assert outcome(guest, guest.run()) == ("io" if allowed else "#GP")


def test_iopl_makes_the_bitmap_idle(any_host: Any) -> None:
    with ProtectedGuest(any_host, BYTE, user=True) as guest:
        guest.regs(rdx=0x20, rflags=2 | IOPL3)
        assert outcome(guest, guest.run()) == "io"


def test_the_end_of_the_tss(any_host: Any) -> None:
    """Two bytes are read for every access: the last port whose bits can be asked for is 8 below the limit."""
    last = (0x27F - 0x80) * 8 - 8
    for port, expected in ((last + 7, "io"), (last + 8, "#GP"), (0xFFFF, "#GP")):
        with ProtectedGuest(any_host, BYTE, user=True) as guest:
            if not feature(guest, "the model"):
                pytest.skip("KVM's emulation takes the last byte too")
            guest.put(BITMAP, bytes(0x200))
            guest.regs(rdx=port)
            assert outcome(guest, guest.run()) == expected


@pytest.mark.parametrize("what", ["a bitmap past the limit", "a small TSS", "a 16-bit TSS"])
def test_no_bitmap(any_host: Any, what: str) -> None:
    with ProtectedGuest(any_host, BYTE, user=True) as guest:
        guest.put(BITMAP, bytes(0x200))
        if what == "a bitmap past the limit":
            guest.put(TSS + 0x66, struct.pack("<H", 0x280))
        elif feature(guest, "the model"):
            limit, access = (0x66, 0x89) if what == "a small TSS" else (0x27F, 0x81)
            guest.set_descriptor(0x18, segment_descriptor(TSS, limit, access, 0))
            guest.put(TSS, struct.pack("<HHHI", 0, 0x8800, DATA32, 0) if access == 0x81 else guest.get(TSS, 10))
        else:
            pytest.skip("QEMU's CPU, on which the lab runs, and a paravirtual kernel have no such TSS")
        guest.regs(rdx=0x20)
        assert outcome(guest, guest.run()) == "#GP"


def test_port_0xffff_and_what_is_behind_it(any_host: Any) -> None:
    """A wide access at the last port asks for bits behind 0xFFFF, which the byte after the bitmap has."""
    for behind, expected in ((0xFF, "#GP"), (0, "io")):
        with ProtectedGuest(any_host, DWORD, user=True) as guest:
            if not feature(guest, "the model"):
                pytest.skip("needs a TSS of more than 8 KiB, which only the model's rows make")
            at = 0x30000
            guest.put(at, guest.get(TSS, 0x68))
            guest.put(at + 0x66, struct.pack("<H", 0x80))
            guest.put(at + 0x80, bytes(0x2000) + bytes((behind,)) + b"\xff")
            guest.set_descriptor(0x18, segment_descriptor(at, 0x80 + 0x2001, 0x89, 0))
            guest.regs(rdx=0xFFFF)
            exit = guest.run()
            assert outcome(guest, exit) == expected
            if isinstance(exit, Io):
                assert (exit.port, exit.size) == (0xFFFF, 4)


def test_virtual_8086_code_always_asks(any_host: Any) -> None:
    """Even at IOPL 3."""
    enter = code(
        "6a006a00 6a006a00 68003000 00680008 00006802 30020068 00100000 68000100 00cf",
        "push 0; push 0; push 0; push 0; push 0x3000; push 0x800; push 0x23002; push 0x1000; push 0x100; iretd",
        32,
    )
    for allowed in (False, True):
        with ProtectedGuest(any_host, enter) as guest:
            if not feature(guest, "hardware virtualization"):
                pytest.skip("a paravirtual KVM has no virtual-8086 mode")
            guest.put(0x10100, code("e610", "out 0x10, al", 16))
            if allowed:
                allow(guest, 0x10)
            assert outcome(guest, guest.run()) == ("io" if allowed else "#GP")


def user_long(guest: LongGuest) -> None:
    """Ring 3 in 64-bit mode: user bits in the tables, and segments."""
    for at, count in ((PML4, 1), (PDPT, 4), (PD_LOW, 1)):
        entries = struct.unpack(f"<{count}Q", guest.get(at, 8 * count))
        guest.put(at, struct.pack(f"<{count}Q", *(entry | 4 if entry else 0 for entry in entries)))
    sregs = guest.vcpu.get_sregs()
    for name in ("cs", "ss"):
        getattr(sregs, name).dpl = 3
        getattr(sregs, name).selector |= 3
    sregs.tr.limit = 0xFFF
    guest.vcpu.set_sregs(sregs)
    guest.put(TSS + 4, struct.pack("<Q", 0x1F000))


def test_the_64_bit_tss(any_host: Any) -> None:
    for allowed in (False, True):
        with LongGuest(any_host, code("e610", "out 0x10, al")) as guest:
            if not feature(guest, "an exact CPU"):
                pytest.skip("the lab's CPU takes no bitmap of a task register that KVM loaded: it is busy")
            user_long(guest)
            guest.put(TSS + 0x66, struct.pack("<H", 0x80))
            guest.put(TSS + 0x80, b"\xff\xff" + (b"\xfe" if allowed else b"\xff"))
            exit = guest.run()
            if allowed:
                assert isinstance(exit, Io)
            else:
                assert exit == Hlt() and guest.vector() == 13 and guest.frame()[:2] == (0, CODE)


def test_a_tss_that_is_not_mapped(model_host: Any) -> None:
    """Reading the bitmap may fault: #PF, of the supervisor's."""
    with LongGuest(model_host, code("e610", "out 0x10, al")) as guest:
        user_long(guest)
        guest.put(PD_LOW + 8, bytes(8))  # [2 MiB, 4 MiB)
        sregs = guest.vcpu.get_sregs()
        sregs.tr.base = 0x1FFF9A
        guest.vcpu.set_sregs(sregs)
        guest.put(0x1FFF9A + 4, struct.pack("<Q", 0x1F000))
        assert guest.run() == Hlt() and guest.vector() == 14 and guest.frame().error == 0
        assert guest.vcpu.get_sregs().cr2 == 0x200000


# ---- string forms outside 64-bit mode
@pytest.mark.parametrize(
    ("text", "size"),
    [
        (code("f36e", "rep outsb", 32), 1),
        (code("66f36f", "rep outsw", 32), 2),
        (code("f36f", "rep outsd", 32), 4),
        (code("67f36e", "addr16 rep outsb", 32), 1),
        (code("64f36f", "fs rep outsd", 32), 4),
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_outs(any_host: Any, text: bytes, size: int, backwards: bool) -> None:
    with ProtectedGuest(any_host, code("fd", "std", 32) * backwards + text + b"\xf4") as guest:
        if not feature(guest, "hardware virtualization"):
            pytest.skip("a paravirtual KVM starts this guest without its flags")
        sregs = guest.vcpu.get_sregs()
        base = 0
        if b"\x64" in text:
            base = sregs.fs.base = 0x1000
        guest.vcpu.set_sregs(sregs)
        start = 0x4000 + (3 * size if backwards else 0)
        guest.put(0x4000 + base, bytes(range(1, 4 * size + 1)))
        guest.regs(rsi=start, rcx=4, rdx=0x77)
        got = []
        while isinstance(exit := guest.run(), Io):
            got += [exit.data[n : n + size] for n in range(0, len(exit.data), size)]
        assert exit == Hlt()
        items = [bytes(range(1 + n * size, 1 + n * size + size)) for n in range(4)]
        assert got == (items[::-1] if backwards else items)
        assert guest.regs().rcx == 0 and guest.regs().rsi == start + (-4 if backwards else 4) * size


def feed(guest: Any, size: int) -> list[int]:
    """Answer string input with 1, 2, 3... until HLT; the counts of the exits."""
    number, counts = 1, []
    while isinstance(exit := guest.run(), Io):
        assert not exit.is_out and exit.size == size
        counts.append(exit.count)
        guest.vcpu.answer_io(exit, b"".join((number + n).to_bytes(size, "little") for n in range(exit.count)))
        number += exit.count
    assert exit == Hlt()
    return counts


@pytest.mark.parametrize(
    ("text", "size"), [(code("f36c", "rep insb", 32), 1), (code("66f36d", "rep insw", 32), 2), (code("f36d", "rep insd", 32), 4)]
)
@pytest.mark.parametrize("backwards", [False, True])
def test_ins(any_host: Any, text: bytes, size: int, backwards: bool) -> None:
    with ProtectedGuest(any_host, code("fd", "std", 32) * backwards + text + b"\xf4") as guest:
        start = DATA + 0x100
        guest.regs(rdi=start, rcx=5, rdx=0x77)
        feed(guest, size)
        step = -size if backwards else size
        for n in range(5):
            assert guest.get(start + n * step, size) == (n + 1).to_bytes(size, "little")
        assert guest.regs().rdi == start + 5 * step and guest.regs().rcx == 0


def test_ins_wraps_in_16_bits(any_host: Any) -> None:
    """DI wraps at the segment's end, and so does what is stored."""
    with RealGuest(any_host, code("f36cf4", "rep insb; hlt", 16)) as guest:
        guest.regs(rdi=0xFFFE, rcx=4, rdx=0x77)
        sregs = guest.vcpu.get_sregs()
        sregs.es.base, sregs.es.selector = 0x20000, 0x2000
        guest.vcpu.set_sregs(sregs)
        feed(guest, 1)
        assert guest.get(0x2FFFE, 2) == b"\1\2" and guest.get(0x20000, 2) == b"\3\4" and guest.regs().rdi & 0xFFFF == 2


def test_addresses_of_32_bits_in_64_bit_mode(any_host: Any) -> None:
    with LongGuest(any_host, code("67f36e67 f36cf4", "addr32 rep outsb; addr32 rep insb; hlt")) as guest:
        guest.put(DATA, b"ab")
        guest.regs(rsi=0x5_0000_0000 + DATA, rcx=0x7_0000_0002, rdi=0x9_0000_0000 + DATA, rdx=0x77)
        first = guest.run()
        assert isinstance(first, Io) and first.data[:1] == b"a"
        while isinstance(guest.run(), Io):
            pass
        assert guest.regs().rsi == DATA + 2 and guest.regs().rcx == 0


LIMITS = [
    ("outsb past the limit", code("6e", "outsb", 32), 0x100, 13),
    ("outsd across the limit", code("6f", "outsd", 32), 0xFD, 13),
    ("insb past the limit", code("6c", "insb", 32), 0x100, 13),
    ("outsb from SS past the limit", code("366e", "ss outsb", 32), 0x100, 12),
    ("the last byte", code("6e", "outsb", 32), 0xFF, 0),
]


@pytest.mark.parametrize(("what", "text", "offset", "vector"), LIMITS, ids=[row[0] for row in LIMITS])
def test_segment_limits(model_host: Any, what: str, text: bytes, offset: int, vector: int) -> None:
    """The engine does not look at limits; what is executed here does."""
    with ProtectedGuest(model_host, text) as guest:
        sregs = guest.vcpu.get_sregs()
        for name in ("ds", "es"):
            getattr(sregs, name).limit = 0xFF
        if vector == 12:
            sregs.ss.limit = 0xFF
        guest.vcpu.set_sregs(sregs)
        guest.put(0xF800, b"\xb8" + CODE.to_bytes(4, "little") + b"\xff\xe0")  # mov eax, CODE; jmp eax
        guest.regs(rsi=offset, rdi=offset, rdx=0x77)
        if vector == 12:
            task = struct.pack("<2I8I6I2I", 0x18000, 2, *[0] * 4, USER_STACK, 0, 0, 0, DATA32, 8, DATA32, DATA32, 0, 0, 0, 0)
            guest.set_gate(12, 0, 0x60, 5)
            guest.put(0x7800 + 0x20, task)
            guest.put(0x18000, b"\xf4")
            assert guest.run() == Hlt() and guest.regs().rip == 0x18001
        elif vector:
            assert guest.run() == Hlt() and guest.vector() == vector and guest.frame().eip == CODE
        else:
            assert isinstance(guest.run(), Io)


def test_string_input_into_code(model_host: Any) -> None:
    """ES names code: not writable, #GP; a null ES the same."""
    for selector, kind in ((8, 0xB), (0, 0)):
        with ProtectedGuest(model_host, code("6c", "insb", 32)) as guest:
            sregs = guest.vcpu.get_sregs()
            sregs.es.selector, sregs.es.type, sregs.es.present, sregs.es.unusable = selector, kind, int(bool(kind)), int(not kind)
            guest.vcpu.set_sregs(sregs)
            guest.regs(rdi=DATA, rdx=0x77)
            assert guest.run() == Hlt() and guest.vector() == 13 and guest.frame().error == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [(code("6648ef", ".byte 0x66, 0x48, 0xef"), 4), (code("4866ef", ".byte 0x48, 0x66, 0xef"), 2), (code("48ef", ".byte 0x48, 0xef"), 4)],
)
def test_rex_w_overrules_an_operand_size_prefix(any_host: Any, text: bytes, size: int) -> None:
    """Right before the opcode; elsewhere a REX prefix counts for nothing."""
    with LongGuest(any_host, text) as guest:
        guest.regs(rdx=0x77, rax=0x1122334455667788)
        exit = guest.run()
        assert isinstance(exit, Io) and exit.size == size
