"""The guest's side of SEV-ES on the tiny host: programs run unchanged, and the host learns no more than it must."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import tiny_es
import unicorn
from boot_image import GHCBS, SHARED_PAGE, SW_PROTECTED
from es_programs import CPUID, passed, terminated, text
from test_programs_engine import counts
from tiny_es import EsEngine

from guest import build, patterns

pytestmark = pytest.mark.gcc

uc: Any = unicorn
MARKER = 0x5EC2E75EC2E7


# ---- programs


@pytest.mark.parametrize("index", [0, 3])
def test_hello(index: int) -> None:
    """On vCPU 0 the whole program; on another one the page of that vCPU, found by its task register."""
    engine = EsEngine(index=index)
    engine.run(build.build("hello"), "exit=9")
    assert engine.msr == GHCBS + 0x1000 * index
    assert engine.msr_questions == [2], "one question by the MSR, all others by the page"
    if index == 0:
        assert engine.result.console == "hello from sevmm\nvm type: sev-es\narguments: exit=9\nhello from vCPU 0\n"
        assert (engine.result.end, engine.result.code) == ("exit", 9)
    else:
        assert (engine.result.end, engine.result.console) == ("HLT", f"hello from vCPU {index}\n")


@pytest.mark.parametrize("versions", [(1, 1), (1, 2), (0, 9)])
def test_exits_until_its_exceptions(versions: tuple[int, int]) -> None:
    """Each kind of exit, with both versions of the protocol; this engine delivers no exception but #VC."""
    engine = EsEngine(versions)
    with pytest.raises(uc.UcError):
        engine.run(build.build("exits"))
    lines = engine.result.console.splitlines()
    kinds = ("io", "string io", "mmio", "msr", "hypercall")
    assert lines[:-2] == ["exits: io ok", "exits: rep outsb speaks", *(f"exits: {kind} ok" for kind in kinds[1:])]
    assert lines[-2] == "exits: cpuid ok, vendor TinyofESHost, hypervisor none"
    assert lines[-1] == f"exits: ghcb ok, version {min(2, versions[1])}, features 0x3"
    assert engine.result.exits["MMIO"] == 11
    assert engine.jump_table == 0


def test_convert_and_private_memory() -> None:
    result = EsEngine().run(build.build("convert"))
    assert result.code == 0, result.console
    assert counts(result.conversions) == {True: 3 * 769, False: 2 * 769 + 2}
    engine = EsEngine()
    assert engine.run(build.build("private-memory")).code == 0, engine.result.console
    assert "alias without C-bit shows nothing" in engine.result.console
    assert engine.shared.find(patterns.private_marker()) == -1


def test_instructions_that_this_kvm_does_not_intercept() -> None:
    engine = EsEngine()
    engine.run(text("""
	uint32_t a = 0, c = 0, d = 0;
	asm volatile("rdtsc" : "=a"(a), "=d"(d));
	CHECK(a == 0x11 && d == 0x22, "rdtsc %x %x", a, d);
	asm volatile("rdtscp" : "=a"(a), "=d"(d), "=c"(c));
	CHECK(a == 0x33 && d == 0x44 && c == 0x55, "rdtscp %x %x %x", a, d, c);"""))  # fmt: skip
    passed(engine)
    assert {0x6E, 0x87} <= {code for code, _, _ in engine.seen}


def test_questions_without_an_instruction() -> None:
    engine = EsEngine()
    engine.run(text("""
	CHECK(ghcb_reset_hold() == 1, "reset hold");
	CHECK(ghcb_reset_hold_msr() == 1, "reset hold, MSR");
	ghcb_nmi_done();
	ghcb_set_jump_table(0x12345000);
	CHECK(ghcb_jump_table() == 0x12345000, "jump table");"""))  # fmt: skip
    passed(engine)
    assert [code for code, _, _ in engine.seen[:4]] == [0x80000004, 0x80000003, 0x80000005, 0x80000005]
    assert engine.msr == GHCBS, "the page is registered again after the MSR protocol"


# ---- strings


STRINGS = "".join(
    f"""
	if (size == {size}) {{
		asm volatile("rep outs{letter}" : "+S"(at), "+c"(left) : "d"(0x123) : "memory");
		CHECK(left == 0 && at == from + count * size, "outs: %lu left", left);
		at = to, left = count;
		asm volatile("rep ins{letter}" : "+D"(at), "+c"(left) : "d"(PORT_ECHO) : "memory");
		CHECK(left == 0 && at == to + count * size, "ins: %lu left", left);
	}}"""
    for letter, size in (("b", 1), ("w", 2), ("l", 4))
)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 507, 2033, 4096])
def test_strings_in_pieces_that_fit_the_buffer(size: int, count: int) -> None:
    """What arrives is what was sent, and back; RSI, RDI and RCX are as after the instruction, nothing beside is written."""
    engine = EsEngine()
    elf = text(f"""
	static uint8_t from[20000], to[20000];
	uint64_t size, count, left;
	void *at = from;
	argument_value(boot, "size", &size), argument_value(boot, "count", &count), left = count;
	for (unsigned i = 0; i < sizeof(from); i++)
		from[i] = i * 13 + i / 256, to[i] = 0x77;{STRINGS}
	for (unsigned i = 0; i < sizeof(to); i++)
		CHECK(to[i] == (i < count * size ? 'A' + i / size % 26 : 0x77), "byte %u is %x", i, to[i]);""")  # fmt: skip
    engine.run(elf, f"size={size} count={count}")
    passed(engine)
    assert engine.strings == bytes(i * 13 + i // 256 & 255 for i in range(count * size))
    strings = [(info, n) for code, info, n in engine.seen if code == 0x7B and info & 4]
    per_piece, pieces = 2032 // size, math.ceil(count / (2032 // size))
    assert len(strings) == 2 * pieces and sum(n for _, n in strings) == 2 * count
    assert all(n <= per_piece for _, n in strings)
    if count:
        assert strings[0][0] == 0x123 << 16 | 3 << 10 | 1 << 9 | size << 4 | 8 | 4
        assert strings[-1][0] == 0xF8 << 16 | 1 << 9 | size << 4 | 8 | 4 | 1


def test_one_item_of_a_string_and_a_string_backwards() -> None:
    engine = EsEngine()
    engine.run(text("""
	static char byte = 'x';
	void *at = &byte;
	uint64_t count = 77;
	asm volatile("outsb" : "+S"(at), "+c"(count) : "d"(PORT_CONSOLE) : "memory");
	CHECK(at == &byte + 1 && count == 77, "outsb");
	asm volatile("std; outsb; cld" : "+S"(at) : "d"(PORT_CONSOLE) : "memory");"""))  # fmt: skip
    assert terminated(engine) == (14, 2)
    assert engine.result.console.startswith("xguest #VC: a string backwards: exit code 0x7b, rip 0x")


# ---- what the host may know


@pytest.mark.parametrize(
    ("instruction", "given"),
    [
        ("outb %al, $0x12", {"rax": MARKER & 0xFF}), ("outw %ax, $0x12", {"rax": MARKER & 0xFFFF}), ("inb $0x12, %al", {}),
        ("cpuid", {"rax": MARKER & 0xFFFFFFFF, "rcx": MARKER & 0xFFFFFFFF}),
        ("movb %al, (%r9)", {}), ("movb (%r9), %al", {}), ("rdtsc", {}), ("rdtscp", {}),
    ],
)  # fmt: skip
def test_the_host_learns_only_what_the_instruction_says(instruction: str, given: dict[str, int]) -> None:
    """Every register holds a marker; in the page are the inputs, cut to their width, and no other field is valid."""
    names = ("rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r10", "r11", "r12", "r13", "r14", "r15", "rax")
    load = "".join(f"movq ${MARKER}, %%{name}; " for name in names) + "movq $0xd0000000, %%r9; "
    clobbers = ", ".join(f'"{name}"' for name in (*names, "r9", "memory"))
    engine = EsEngine()
    seen: dict[str, Any] = {}

    def look() -> None:
        page = bytes(engine.shared[GHCBS : GHCBS + 0x1000])
        seen["page"] = page
        seen["valid"] = {name: engine.get(name) for name in ("rax", "rbx", "rcx", "rdx", "cpl") if engine.valid(name)}

    honest = engine._host

    def host() -> None:
        first = not seen and engine.msr & 0xFFF == 0
        if first:
            at = engine.msr + tiny_es.VALID
            engine.given = bytes(engine.shared[at : at + 16])
            look()
        honest()

    engine._host = host  # type: ignore[method-assign]
    engine.run(text(f'\tasm volatile("{load}{instruction.replace("%", "%%")}" : : : {clobbers});'))
    passed(engine)
    assert seen["valid"] == given
    for piece in (MARKER, MARKER >> 16, MARKER >> 8 & 0xFFFFFFFF):
        expected = {value for value in given.values() if value.to_bytes(8, "little").find(piece.to_bytes(6, "little")[:4]) >= 0}
        assert expected or piece.to_bytes(6, "little")[:4] not in seen["page"]


# ---- before there is a page


def test_early_cpuid_goes_by_the_msr() -> None:
    """A program that does not know it is an SEV-ES guest: CPUID works, and the first other exit is the end."""
    elf = text(f"""{CPUID}
	volatile uint32_t *out = (volatile uint32_t *)boot->shared_page;
	out[0] = a, out[1] = b, out[2] = c, out[3] = d;
	out8(PORT_CONSOLE, 'x');""")  # fmt: skip
    engine = EsEngine()
    engine.run(elf, vm_type=SW_PROTECTED)
    assert terminated(engine) == (14, 1)
    assert engine.msr_questions == [4, 4, 4, 4, 0x100]
    assert struct.unpack("<4I", engine.shared[SHARED_PAGE : SHARED_PAGE + 16]) == EsEngine.cpuid(1)


def test_no_boot_info_means_no_last_words() -> None:
    engine = EsEngine()
    engine.run(build.build("hello"), magic=False)
    assert terminated(engine) == (14, 1)
    assert engine.result.console == ""


# ---- MMIO


MMIO_OPERATIONS = [
    ("addb %%cl, (%%rax)", None), ("addw %%cx, (%%rax)", None), ("addl %%ecx, (%%rax)", None), ("addq %%rcx, (%%rax)", None),
    ("movzbl (%%rax), %%ecx", 0x88), ("movsbq (%%rax), %%rcx", 0xFFFFFFFFFFFFFF88), ("movswl (%%rax), %%ecx", 0xFFFF9988),
    ("movslq (%%rax), %%rcx", 0xFFFFFFFFBBAA9988), ("movb (%%rax), %%ch", 0x1122334455668899), ("movl (%%rax), %%ecx", 0xBBAA9988),
    ("movw (%%rax), %%cx", 0x1122334455669988), ("movq (%%rax), %%rcx", 0xFFEEDDCCBBAA9988), ("movb $0x5a, (%%rax)", None),
    ("movw $-2, 1(%%rax)", None), ("movl $-3, (%%rax,%%rdx,4)", None), ("movq $-4, -8(%%rax,%%rdx,8)", None), ("movb %%ch, 7(%%rax)", None),
]  # fmt: skip


def test_mmio_is_what_memory_would_be() -> None:
    """The same instruction on memory and on a device: same registers, same flags, same contents."""
    steps = "".join(
        f"""
	word = *(volatile uint64_t *)boot->mmio = 0xffeeddccbbaa9988;
	for (unsigned i = 0; i < 2; i++)
		asm volatile("cmpq %%rdx, %%rdx; stc; {operation}; pushfq; popq %1" : "=c"(rcx[i]), "=r"(flags[i]) :
			"0"(0x1122334455668899), "a"(places[i]), "d"(1UL) : "memory", "cc");
	CHECK(rcx[0] == rcx[1], "{number}: RCX 0x%lx of memory, 0x%lx of the device", rcx[0], rcx[1]);
	CHECK(flags[0] == flags[1], "{number}: flags 0x%lx of memory, 0x%lx of the device", flags[0], flags[1]);
	seen = *(volatile uint64_t *)boot->mmio;
	CHECK(word == seen, "{number}: 0x%lx in memory, 0x%lx in the device", word, seen);
	((volatile uint64_t *)boot->shared_page)[{number}] = rcx[1];"""
        for number, (operation, _) in enumerate(MMIO_OPERATIONS)
    )
    engine = EsEngine()
    engine.run(text(f"""
	static volatile uint64_t word;
	uint64_t rcx[2], flags[2], places[2] = {{ (uint64_t)&word, boot->mmio }}, seen;{steps}"""))  # fmt: skip
    passed(engine)
    found = struct.unpack_from(f"<{len(MMIO_OPERATIONS)}Q", engine.shared, SHARED_PAGE)
    for value, (operation, expected) in zip(found, MMIO_OPERATIONS):
        assert expected is None or value == expected, operation
