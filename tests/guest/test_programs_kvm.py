"""The guests on this machine's own KVM, booted by the tiny VMM.

What a paravirtual KVM (CONFIG_KVM_PVM, Linux 6.18) was seen to deliver: port and string I/O, MMIO, HLT, SHUTDOWN, MSR
exits (KVM_CAP_X86_USER_SPACE_MSR with reason UNKNOWN), and inside the guest #DE, #UD, #GP and #PF with error code and
CR2. A hypercall never comes out of KVM_RUN there, although KVM_CAP_EXIT_HYPERCALL may be enabled: such tests carry the
marker `hypercall`.
"""

from __future__ import annotations

import pytest
import tiny_vmm
from boot_image import FEATURE_HYPERCALL, FEATURE_IMPLICIT, FEATURE_MMIO, FEATURE_MSR, TEST_AREA

from guest import build, patterns

pytestmark = [pytest.mark.kvm, pytest.mark.gcc]


@pytest.mark.parametrize(("arguments", "code"), [("", 0), ("exit=7", 7), ("a exit=0x2a b", 42), ("exit=300", 44)])
def test_hello_passes_its_exit_code(arguments: str, code: int) -> None:
    result = tiny_vmm.run(build.build("hello"), arguments)
    expected = ["hello from sevmm", "vm type: plain", "hello from vCPU 0"]
    if arguments:
        expected.insert(2, f"arguments: {arguments}")
    assert result.console.splitlines() == expected
    assert (result.end, result.code) == ("exit", code)


def test_hello_waits_for_every_vcpu() -> None:
    result = tiny_vmm.run(build.build("hello"), vcpus=4)
    assert result.code == 0
    lines = result.console.splitlines()
    assert sorted(line for line in lines if "vCPU" in line) == [f"hello from vCPU {n}" for n in range(4)]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("", "vector 6 (#UD) error 0x0 rip 0x"),
        ("de", "vector 0 (#DE) error 0x0 rip 0x"),
        ("gp", "vector 13 (#GP) error 0x0 rip 0x"),
        ("pf", "cr2 0x18"),
        ("pf=0xffff888000000000", "cr2 0xffff888000000000"),
    ],
)
def test_crash_says_what_happened(arguments: str, line: str) -> None:
    result = tiny_vmm.run(build.build("crash"), arguments)
    first, second = result.console.splitlines()
    assert first.startswith("crash: ")
    assert second.startswith("guest exception: vector ") and line in second
    assert result.code == 0x7F


def test_triple_fault_shuts_down() -> None:
    result = tiny_vmm.run(build.build("crash"), "triple")
    assert (result.end, result.code) == ("SHUTDOWN", None)


@pytest.mark.parametrize(("arguments", "end"), [("", "timeout"), ("hlt", "HLT")])
def test_spin_never_ends(arguments: str, end: str) -> None:
    result = tiny_vmm.run(build.build("spin"), arguments, timeout=0.3)
    assert (result.console, result.end, result.code) == ("spin: spinning\n", end, None)


@pytest.mark.parametrize("features", [0, FEATURE_MMIO, FEATURE_MMIO | FEATURE_MSR])
def test_exits(features: int) -> None:
    result = tiny_vmm.run(build.build("exits"), features=features)
    assert result.code == 0, result.console
    lines = result.console.splitlines()
    for feature, name in ((FEATURE_MMIO, "mmio"), (FEATURE_MSR, "msr"), (FEATURE_HYPERCALL, "hypercall")):
        assert f"exits: {name} {'ok' if features & feature else 'skipped (not offered)'}" in lines
    assert {"exits: io ok", "exits: rep outsb speaks", "exits: string io ok", "exits: exceptions ok"} <= set(lines)
    assert lines[-1] == "exits: done"
    # a write and a read for each of four widths; add reads and writes; then it is read once more
    assert result.exits["MMIO"] == (11 if features & FEATURE_MMIO else 0)
    assert result.exits["RDMSR"] == result.exits["WRMSR"] == (1 if features & FEATURE_MSR else 0)


@pytest.mark.parametrize("name", ["convert", "private-memory"])
def test_guest_says_what_the_vmm_lacks(name: str) -> None:
    result = tiny_vmm.run(build.build(name), features=0)
    assert result.console == "check failed: the VMM offers no MAP_GPA_RANGE hypercall\n"
    assert result.code == 1


@pytest.mark.hypercall
@pytest.mark.parametrize("name", ["exits", "convert"])
def test_hypercalls(name: str) -> None:
    result = tiny_vmm.run(build.build(name), features=FEATURE_HYPERCALL | FEATURE_MMIO)
    assert result.code == 0, result.console
    assert result.exits["HYPERCALL"] == len(result.conversions) > 0


@pytest.mark.hypercall
@pytest.mark.sw_protected
@pytest.mark.parametrize("name", ["convert", "private-memory"])
def test_sw_protected(name: str) -> None:
    result = tiny_vmm.run(build.build(name), protected=True, features=FEATURE_HYPERCALL)
    assert result.code == 0, result.console
    assert patterns.private_marker() not in result.memory


@pytest.mark.sw_protected
def test_implicit_conversions() -> None:
    result = tiny_vmm.run(build.build("fault"), protected=True, lazy_private=True, features=FEATURE_IMPLICIT)
    assert result.code == 0, result.console
    assert result.exits["MEMORY_FAULT"] == 20
    assert {gpa for gpa, _, _ in result.conversions} == {TEST_AREA + 4096 * n for n in range(20)}
