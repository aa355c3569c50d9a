"""An SEV-ES guest whose host lies: whatever it answers, and wherever it makes #VC come, the guest ends with a termination request
that says why, and gives nothing away.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny_es
from boot_image import GHCBS
from es_programs import CPUID, at_symbol, passed, terminated, text
from tiny_es import UD, EsEngine

from guest import build

pytestmark = pytest.mark.gcc


def say(info_1: int, info_2: int) -> tiny_es.Answer:
    return lambda engine: engine.done(info_1, info_2)


def silent(engine: EsEngine) -> None:
    """As if VMGEXIT had done nothing: the page is as the guest left it."""
    at = engine.msr + tiny_es.VALID
    for name, value in zip(("code", "info_1", "info_2"), engine.seen[-1]):
        engine.put(name, value)
    engine.shared[at : at + 16] = engine.given
    engine.out = {}


def without(*names: str) -> tiny_es.Answer:
    """An answer that lacks a register."""

    def answer(engine: EsEngine) -> None:
        engine.out = {name: 1 for name in ("rax", "rbx", "rcx", "rdx") if name not in names}

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        say(2, 1), say(2, 6), say(3, 0), say(0xFFFFFFFF, 0), say(1, 0), say(1, 0x0000030D), say(1, 0x8000000D), say(1, 0x8000020D),
        say(1, 0x80000303), say(1, 0x8000031D), without("rax"), without("rbx"), without("rcx"), without("rdx"), silent,
    ],
)  # fmt: skip
def test_no_answer_ends_the_guest(answer: tiny_es.Answer) -> None:
    engine = EsEngine()
    engine.answers[0x72] = answer
    engine.run(text(CPUID))
    assert terminated(engine) == (14, 4)
    assert engine.result.console == ""


def test_nothing_of_an_earlier_question_is_an_input_of_the_next() -> None:
    """The host leaves every bit of the valid bitmap set."""
    engine = EsEngine()
    given: list[set[str]] = []
    honest = engine._host

    def host() -> None:
        honest()
        if engine.msr & 0xFFF == 0:
            given.append({name for name in tiny_es.PLACES if engine.valid(name)} - {"code", "info_1", "info_2"})
            engine.shared[GHCBS + tiny_es.VALID : GHCBS + tiny_es.VALID + 16] = b"\xff" * 16

    engine._host = host  # type: ignore[method-assign]
    engine.run(text(CPUID + "\n\tout8(0x12, 1);\n\tin8(0x12);\n\tghcb_features();"))
    passed(engine)
    assert given == [{"rax", "rcx"}, {"rax"}, set(), set(), {"rax"}]


def test_a_silent_host_at_a_port() -> None:
    engine = EsEngine()
    engine.answers[0x7B] = silent
    engine.run(build.build("hello"))
    assert terminated(engine) == (14, 4)


@pytest.mark.parametrize(("event", "vector", "error"), [(UD, 6, 0), (0x8000030D, 13, 0), (0x77_80000B0D, 13, 0x77)])
def test_the_host_may_raise_an_exception(event: int, vector: int, error: int) -> None:
    """It comes at the instruction itself, whose registers are untouched."""
    engine = EsEngine()
    engine.answers[0x72] = say(1, event)
    engine.run(text(f"""
	struct caught caught;
	uint64_t rax = 0;
	bool taken = EXPECT_EXCEPTION({vector}, &caught, "movl $0x5a, %%eax; cpuid; movq $0, %[rax]", [rax] "m"(rax));
	CHECK(taken && caught.vector == {vector} && caught.error == {error}, "%u %lu %lu", taken, caught.vector, caught.error);
	CHECK(*(volatile uint8_t *)caught.rip == 0x0f && *(volatile uint8_t *)(caught.rip + 1) == 0xa2, "rip");"""))  # fmt: skip
    passed(engine)


def test_an_exception_nobody_expects_is_printed() -> None:
    engine = EsEngine()
    engine.run(text('\tasm volatile("rdmsr" : : "c"(0x12345) : "rax", "rdx");'))
    assert (engine.result.end, engine.result.code) == ("exit", 0x7F)
    assert engine.result.console.startswith("guest exception: vector 13 (#GP) error 0x0 rip 0x")


@pytest.mark.parametrize(
    ("versions", "expected"), [((3, 4), (0, 1)), ((0, 0), (0, 1)), ((0xFFFF, 0xFFFF), (0, 1))]
)  # fmt: skip
def test_no_version_in_common(versions: tuple[int, int], expected: tuple[int, int]) -> None:
    engine = EsEngine(versions)
    engine.run(build.build("hello"))
    assert terminated(engine) == expected


def test_another_c_bit_than_the_measured_one() -> None:
    engine = EsEngine()
    engine.answers[2] = lambda engine: setattr(engine, "msr", 2 << 48 | 1 << 32 | 47 << 24 | 1)
    engine.run(build.build("hello"))
    assert terminated(engine) == (0, 0)


@pytest.mark.parametrize("question", [2, 6, 0x80])
def test_the_msr_protocol_without_an_answer(question: int) -> None:
    engine = EsEngine()
    engine.answers[question] = lambda engine: None
    engine.run(text("\tghcb_reset_hold_msr();\n\tghcb_features_msr();"))
    assert terminated(engine) == (14, 4)


FAKES = [
    ("nop", 0x72, 2, "not the instruction that the exit code stands for"), ("cpuid", 0x7C, 2, "not the instruction"),
    ("rdmsr", 0x72, 2, "not the instruction"), ("nop", 0x7B, 2, "an unknown port access"), ("movb %%al, (%%rbx)", 0x7B, 2, "port"),
    ("nop", 0x400, 2, "an unknown access to a device"), ("outb %%al, %%dx", 0x400, 2, "an unknown access to a device"),
    ("nop", 0x27, 3, "unknown exit code"), ("nop", 0, 3, "unknown exit code"), ("nop", (1 << 64) - 1, 3, "unknown exit code"),
    ("movb %%al, 0x100000", 0x400, 6, "MMIO at an address that is private"), ("movb 0x4000, %%al", 0x400, 6, "private"),
    ("movb %%al, 0x18", 0x400, 6, "not mapped"), ("movq %%rax, (%%rcx)", 0x400, 2, "MMIO across two pages"),
    ("addq %%rdx, 0x4000", 0x400, 6, "private"), ("xchg %%al, (%%rbx)", 0x400, 2, "an unknown access to a device"),
]  # fmt: skip


def fakes() -> Any:
    """All these instructions in one program; the argument chooses one."""
    return text("\tuint64_t which;\n\targument_value(boot, \"which\", &which);" + "".join(
        f"""
	if (which == {number})
		asm volatile(".globl here{number}; here{number}: {instruction}" : :
			"a"(0x5a), "b"(boot->shared_page), "c"(boot->mmio + 0xffc), "d"(1) : "memory");"""
        for number, (instruction, *_) in enumerate(FAKES)
    ))  # fmt: skip


@pytest.mark.parametrize("number", range(len(FAKES)))
def test_a_vc_where_there_is_nothing_to_do(number: int) -> None:
    """The host makes #VC come at an instruction that does not leave, or with another code: nothing is emulated."""
    _, code, expected, words = FAKES[number]
    elf, engine = fakes(), EsEngine()
    here = at_symbol(elf, f"here{number}")
    engine.run(elf, f"which={number}", also={here: code})
    assert terminated(engine) == (14, expected)
    assert engine.result.console.startswith("guest #VC: ") and words in engine.result.console
    assert f"exit code 0x{code:x}, rip 0x{here:x}, bytes " in engine.result.console
    assert all(question == 0x7B and not info & 5 for question, info, _ in engine.seen), "only its own last words"


def test_a_vc_inside_the_handler() -> None:
    elf = text(CPUID)
    engine = EsEngine()
    engine.run(elf, also={at_symbol(elf, "ghcb_open"): 0x72})
    assert terminated(engine) == (14, 5)
