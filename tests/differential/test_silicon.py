"""Random instructions on this machine's own processor and on the model: the same registers, flags, x87 and SSE state, memory and
faults.

The processor runs them in a traced child (traced.py), the model in ring 3 of a guest (ringed.py). A snippet is a pure function
of seed and index (silicon.py); what differs is looked up in silicon_known.py. In CI some hundreds of a fixed seed run; SEVMM_DEEP=N
runs 20,000 * N from a seed that is printed (or SEVMM_SEED), and lists what it found by rule.
"""

from __future__ import annotations

import os
import platform
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
from tests.differential.silicon import GROUPS, NAMES, Bench, Snippet, snippet
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
    assert effect(bytes.fromhex("c4e278f5c3"), 64).defines == STATUS & ~0x14
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
