"""Random instructions on this machine's own processor and on the model: the same registers, flags, x87 and SSE state, memory and
faults.

The processor runs them in a traced child (traced.py), the model in ring 3 of a guest (ringed.py). A snippet is a pure function
of seed and index (silicon.py); what differs is looked up in silicon_known.py. In CI some hundreds of a fixed seed run; SEVMM_DEEP=N
runs 20,000 * N from a seed that is printed (or SEVMM_SEED), and lists what it found by rule.
"""

from __future__ import annotations

import os
import platform
import struct
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from kvmapi.abi.vcpu import kvm_regs
from kvmapi.kernel import KernelHost
from kvmapi.model.host import ModelHost
from tests.differential.conftest import DEEP
from tests.differential.opcodes import CF, OF, STATUS, effect
from tests.differential.ringed import Ringed
from tests.differential.silicon import GROUPS, NAMES, Bench, Result, Snippet, snippet
from tests.differential.silicon_known import RULES, rule_for
from tests.differential.traced import CODE, DATA, DIED, STACK, SYSCALL, TIMEOUT, Traced

pytestmark = [pytest.mark.model, pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor to compare with")]
SEED = int(os.environ.get("SEVMM_SEED", "1"))
IN_CI = 1500
_IMAGE = bytes.fromhex("7f03") + bytes(22) + bytes.fromhex("801f0000") + bytes(484)


@pytest.fixture(scope="module")
def bench() -> Any:
    """The processor and the model."""
    try:
        made = Bench(ModelHost())
    except PermissionError as error:
        pytest.skip(f"needs ptrace of a child: {error}; get it: a container with CAP_SYS_PTRACE or a seccomp profile that allows ptrace")
    with made:
        yield made


def plain(code: str, bits: int = 64, **registers: int) -> Snippet:
    """One instruction with all registers zero but these."""
    values = [registers.get(name, STACK + 0x800 if name == "rsp" else 0) for name in (NAMES if bits == 64 else NAMES[:8])]
    return Snippet(bits, (("it", bytes.fromhex(code)),), tuple(values), 0x202, _IMAGE, DATA, DATA, bytes(0x2000))


def _words(differing: dict[str, tuple[Any, Any]]) -> str:
    def word(value: Any) -> str:
        return f"{value:#x}" if isinstance(value, int) else f"{len(value)} bytes"

    return ", ".join(f"{name}: model {word(model)}, processor {word(real)}" for name, (model, real) in differing.items())


def test_random_instructions(bench: Bench) -> None:
    seed, count = (SEED if not DEEP or "SEVMM_SEED" in os.environ else time.time_ns() % 1_000_000), 20_000 * DEEP or IN_CI
    known: Counter[str] = Counter()
    unknown, compared = [], 0
    for index in range(count):
        one = snippet(seed, index)
        differing, ran = bench.judge(one)
        compared += bool(ran.parts)
        if differing:
            differing, ran = bench.smaller(one)
            rule = rule_for(ran, differing) if differing else None
            if rule is not None:
                known[rule.name] += 1
            elif differing:
                unknown.append(f"snippet {index} of seed {seed}: {ran}: {_words(differing)}")
    print(f"seed {seed}: {count} snippets, {compared} compared, known differences: {dict(known.most_common())}")
    assert not unknown, f"{len(unknown)} of {compared}:\n" + "\n".join(unknown[:40])
    assert compared > count * 0.9


def test_all_groups_are_made() -> None:
    """Each group of templates has its turn, in both widths."""
    made = {(group, bits) for group, weight in GROUPS.items() if weight for bits in (64, 32) if snippet(1, 5, {group: 1}, bits).code}
    assert len(made) == 2 * sum(1 for weight in GROUPS.values() if weight)
    assert snippet(3, 7) == snippet(3, 7) != snippet(3, 8)


def test_the_judge_sees_a_wrong_model(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that adds one too many is found, and the snippet is made smaller to the instruction that shows it."""
    one = plain("01d8", rax=5, rbx=7)
    one = replace(one, parts=(("nop", b"\x90"), *one.parts, ("nop", b"\x90")))
    assert bench.judge(one)[0] == {}
    before = bench.guest.run_snippet

    def wrong(*arguments: Any) -> Any:
        result = before(*arguments)
        if b"\x01\xd8" in bytes(bench.guest.areas[CODE]):
            bench.guest.now.rax += 1
        return result

    monkeypatch.setattr(bench.guest, "run_snippet", wrong)
    differing, smaller = bench.smaller(one)
    assert differing == {"rax": (13, 12)} and [name for name, _ in smaller.parts] == ["it"]
    assert rule_for(smaller, differing) is None


_NUMBERS = struct.pack("<HHBx26x", 0x37F, 0, 0xFF).ljust(32, b"\0")[:24] + struct.pack("<II", 0x1F80, 0) + b"".join(
    struct.pack("<QH6x", 1 << 63 | n << 40, 0x3FFF + n) for n in range(8)
) + b"".join(struct.pack("<4f", n + 1.5, 2.25, -3.0, n) for n in range(16)) + bytes(96)  # fmt: skip


@pytest.mark.parametrize(
    ("code", "field", "at"),
    [
        ("01d8", "rax", 0), ("01d8", "rflags", 0x10), ("0fa4d805", "rflags", 1), ("660f3800c1", "xmm", 3), ("660f3800c1", "mxcsr", 0),
        ("d8c1", "st", 0), ("d8c1", "st", 9), ("d8c1", "fsw", 0x4000), ("d8c9", "ftw", 1), ("0f58c1", "xmm", 3), ("f20f5ec1", "xmm", 0),
        ("0f58c1", "mxcsr", 0x2000), ("0f58c1", "rip", 1), ("9ed8c1", "rflags", 1), ("0ffcc1", "st", 2), ("dfe8", "rflags", 1),
        ("58", "rsp", 8), ("d9fa", "st", 0), ("8900", "data", 5), ("0f1100", "data", 5), ("dd10", "data", 5), ("f7f1", "rdx", 0),
    ],
)  # fmt: skip
def test_no_rule_hides_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch, code: str, field: str, at: int) -> None:
    """A wrong value in this field, with ordinary operands: no rule explains it. `at` is the byte that is changed, or the bit."""
    one = replace(plain(code, rax=DATA, rbx=7, rcx=5, rdi=DATA), image=_NUMBERS)
    before = bench.on_model

    def wrong(snippet: Snippet) -> Result:
        made = before(snippet)
        value = made.fields[field]
        made.fields[field] = value ^ (at or 1) if isinstance(value, int) else value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]
        return made

    monkeypatch.setattr(bench, "on_model", wrong)
    differing, ran = bench.judge(one)
    assert field in differing
    assert rule_for(ran, differing) is None


@pytest.mark.parametrize(
    ("code", "bits", "registers", "vector", "error", "cr2"),
    [
        ("01d8", 64, {}, 3, 0, 0),
        ("8b00", 64, {"rax": 0x5000}, 14, 4, 0x5000),
        ("8800", 64, {"rax": CODE}, 14, 7, CODE),
        ("ffe0", 64, {"rax": DATA}, 14, 0x15, DATA),
        ("8b00", 64, {"rax": 1 << 60}, 13, 0, 0),
        ("0f0b", 64, {}, 6, 0, 0),
        ("f7f3", 64, {}, 0, 0, 0),
        ("f4", 64, {}, 13, 0, 0),
        ("8ed8", 32, {"rax": 0x10}, 13, 0x10, 0),
        ("cd04", 64, {}, 4, 0, 0),
        ("62c1", 32, {}, 6, 0, 0),
    ],
)
def test_faults(bench: Bench, code: str, bits: int, registers: dict[str, int], vector: int, error: int, cr2: int) -> None:
    """Vector, error code and CR2 on both."""
    one = plain(code, bits, **registers)
    for side in (bench.on_processor(one), bench.on_model(one)):
        assert (side.stop.vector, side.fields["error"], side.fields["cr2"]) == (vector, error, cr2)


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("code", ["39d1e180", "39d1e080", "39d167e1c0", "39d1e0807600", "660f3a610008", "660f3a601008"])
def test_what_needs_a_step(bench: Bench, code: str, bits: int) -> None:
    """LOOPE and LOOPNE leave the flags of the CMP before them; a length of PCMPESTRI that is an address stays one."""
    assert bench.judge(plain(code, bits, rax=DATA, rcx=1, rdx=DATA))[0] == {}


@pytest.mark.parametrize("operation", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize("code", ["660f38{}c0", "660f38{}db", "66450f38{}c9", "66410f38{}c9", "66440f38{}c9", "0f38{}d2", "66400f38{}d2"])
def test_horizontal_sums(bench: Bench, code: str, operation: int) -> None:
    """Of a register with itself, and with one whose number differs in the fourth bit only."""
    differing = bench.judge(replace(plain(code.format(f"{operation:02x}")), image=_NUMBERS))[0]
    assert not set(differing) - ({"st", "ftw", "fsw"} if code.startswith("0f") else set())
    if "st" in differing:
        assert all(differing["st"][0][at : at + 8] == differing["st"][1][at : at + 8] for at in range(0, 80, 10))


@pytest.mark.parametrize("code", ["c500", "c400"])
def test_a_segment_load_that_is_stepped(bench: Bench, code: str) -> None:
    """LDS and LES have a hook, as the same bytes are VEX prefixes in 64-bit code: a step reads the GDT as the processor does."""
    one = replace(plain(code, 32, rax=DATA), data=b"\0\0\0\0\x10\0".ljust(0x2000, b"\0"))
    assert bench.judge(one)[0] == {} and bench.on_model(one).stop[:2] == (13, 0x10)


@pytest.mark.parametrize("code", ["0f05", "cd80", "0f34"])
def test_no_system_call_reaches_the_kernel(bench: Bench, code: str) -> None:
    """RAX 60 would end the child, 57 would fork: neither happens, and the child is there for the next snippet."""
    for number in (60, 57, 1):
        result = bench.on_processor(plain(code, rax=number))
        assert result.stop.vector in (SYSCALL, DIED, 14, 13)
    assert bench.on_processor(plain("01d8", rax=5, rbx=7)).fields["rax"] == 12


def test_an_endless_snippet_is_stopped(bench: Bench) -> None:
    one = plain("ebfe")
    assert bench.on_processor(one).stop.vector == TIMEOUT == bench.on_model(one).stop.vector


def test_the_child_has_nothing_but_the_areas() -> None:
    with Traced() as traced, open(f"/proc/{traced._pid}/maps", encoding="ascii") as maps:
        names = [line.split()[-1] for line in maps]
        pid = traced._pid
    assert all("snippets" in name or name in ("(deleted)", "[vsyscall]") for name in names)
    assert not os.path.exists(f"/proc/{pid}")


def test_effects() -> None:
    """What the table says of some instructions (AMD64 Architecture Programmer's Manual, volume 3)."""
    assert effect(bytes.fromhex("11d8"), 64)[:3] == (CF, STATUS, 0)
    assert effect(bytes.fromhex("c1e003"), 64).undefined == OF | 0x10
    assert effect(bytes.fromhex("d3e0"), 64, 0)[:3] == (0, 0, 0)
    assert effect(bytes.fromhex("480fbcc3"), 64).defines == 0x40
    assert effect(bytes.fromhex("4f656669e90080"), 64).defines == CF | OF
    assert effect(bytes.fromhex("c4e278f5c3"), 64).left_out and effect(bytes.fromhex("490fb503"), 64).left_out
    assert effect(bytes.fromhex("c5f858c1"), 64).left_out and effect(bytes.fromhex("0f05"), 64).left_out


def test_rules_have_reasons() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES) and all(rule.why for rule in RULES)


RING_0 = (
    "8ed8", "8ec0", "8ee0", "8ee8", "0f00d0", "0f02d8", "0f03d8", "0f00e0", "0f00e8", "0f01e0", "0f06", "0f20c3", "0f20d3", "0f20e3",
    "0f09",
    "0f0138", "8b00", "8900", "fa", "fb", "0fa0", "0fa8", "9c", "9d", "f7f3", "0f0b", "0f01f8", "0f32", "48a5", "f3aa", "ff28", "8cd8",
)  # fmt: skip
"""Instructions of ring 0 that a KVM without hardware support executes too."""


@pytest.mark.kvm
def test_ring_0_against_a_kernel() -> None:
    """The second judge: ring 0 in a guest of the kernel's. Ends with UD2, since not every KVM delivers INT3."""
    with Ringed(KernelHost(), 0) as real, Ringed(ModelHost(), 0) as model:
        for text in RING_0:
            for rax in (0, 3, 0x10, 0x18, 0x2B, 0x40, 0x5B, 0xFFFF, CODE, DATA, STACK, DATA + 0x1FF0, 0x5000, 1 << 47):
                seen = []
                for side in (real, model):
                    side.areas[CODE][0x800:0x812] = (
                        bytes.fromhex(text) + b"\x0f\x0b" * ((18 - len(text) // 2) // 2) + b"\x90" * (len(text) // 2 % 2)
                    )
                    side.areas[DATA][:] = bytes(0x2000)
                    side.now = kvm_regs(rax=rax, rcx=4, rdi=DATA, rsi=DATA + 8)
                    side.bind()
                    outcome = side.run_snippet(CODE + 0x800, STACK + 0x800, 0x2, _IMAGE)
                    left = {name: getattr(side.left, name).selector for name in ("ds", "es", "fs", "gs")}
                    registers = [getattr(side.now, name) for name in (*NAMES, "rip")]
                    seen.append((outcome, left, registers, bytes(side.areas[DATA])))
                if seen[0][0][0] < 0:  # an exit, or what this KVM cannot execute
                    continue
                assert seen[0] == seen[1], f"{text} with rax {rax:#x}: kernel {seen[0][:3]}, model {seen[1][:3]}"
