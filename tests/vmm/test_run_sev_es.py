"""SEV-ES guests from the request to the report: their GHCBs, their start by IPI, NMIs, and how they end."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PATIENCE
from tests.vmm import flat
from vmm import boot
from vmm.config import MachineConfig
from vmm.machine import Machine
from vmm.run import GuestRequest, run_guest

MIB = 1 << 20
pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.model]


def run(guest: str, **more: Any) -> Any:
    return run_guest(GuestRequest(guest, **more))


@pytest.mark.gcc
@pytest.mark.parametrize("vcpus", [1, 2, 8])
def test_every_sev_es_vcpu_has_a_ghcb_of_its_own(model_host: Any, vcpus: int) -> None:
    """They print at the same time; the pages are shared in the map, as many as there are vCPUs, and nothing else at that place is."""
    report = run("hello", type="sev-es", host=model_host, memory=16 * MIB, vcpus=vcpus, arguments="exit=3")
    assert (report.result, report.exit_code) == ("fail", 3), (report.console, report.message)
    lines = report.console.splitlines()
    spoken = ["hello from sevmm", "vm type: sev-es", "arguments: exit=3", *(f"hello from vCPU {n}" for n in range(vcpus))]
    assert sorted(lines) == sorted(spoken), "lines of several vCPUs do not mix"
    assert [(row.gpa, row.size) for row in report.map if row.state == "shared"] == [
        (boot.SHARED_PAGE, boot.PAGE), (boot.GHCBS, vcpus * boot.PAGE), (boot.TEST_AREA, boot.TEST_SIZE)
    ]  # fmt: skip


@pytest.mark.gcc
@pytest.mark.parametrize("vcpus", [1, 2, 5])
def test_vcpus_that_start_by_ipi(model_host: Any, vcpus: int) -> None:
    """As measured at the first startup IPI; at a later one out of a reset hold, through the page or the MSR."""
    report = run("ap-start", host=model_host, memory=16 * MIB, vcpus=vcpus, timeout=30 * PATIENCE)
    assert (report.type, report.result, report.exit_code) == ("sev-es", "pass", 0), (report.console, report.message)
    spoken = {f"ap-start: vCPU {n} started" for n in range(1, vcpus)}
    spoken |= {f"ap-start: vCPU {n} came back from its hold ({'MSR' if n & 1 else 'page'})" for n in range(1, vcpus)}
    *lines, last = report.console.splitlines()
    assert set(lines) == spoken and len(lines) == len(spoken)
    assert last == f"ap-start: {vcpus - 1} vCPUs started and came back"
    assert set(report.exits) == {"IO"}, "APIC and reset hold stay in the kernel"


@pytest.mark.gcc
def test_an_sev_es_guest_makes_the_exits_that_a_sev_guest_makes(model_host: Any) -> None:
    """Ports, MMIO, MSRs, hypercalls and conversions: user space cannot tell, but for the strings that only SEV-ES can do."""
    found = {type: run("exits", type=type, host=model_host, memory=16 * MIB) for type in ("sev", "sev-es")}
    for name in ("MMIO", "HYPERCALL", "X86_WRMSR"):
        assert found["sev"].exits[name] == found["sev-es"].exits[name]
    assert found["sev-es"].exits["X86_RDMSR"] == found["sev"].exits["X86_RDMSR"] + 1, "the one that is refused"
    assert [c[:4] for c in found["sev"].conversions] == [c[:4] for c in found["sev-es"].conversions]
    assert "exits: string io ok\n" in found["sev-es"].console
    assert "exits: ghcb ok, version 2, features 0x3\n" in found["sev-es"].console


@pytest.mark.gcc
@pytest.mark.parametrize(("arguments", "line"), [("", "#UD"), ("de", "#DE"), ("gp", "#GP"), ("pf", "cr2 0x18")])
def test_an_sev_es_guest_that_crashes_says_so(model_host: Any, arguments: str, line: str) -> None:
    report = run("crash", type="sev-es", host=model_host, memory=16 * MIB, arguments=arguments)
    assert (report.result, report.exit_code) == ("fail", 0x7F), report.message
    assert line in report.console.splitlines()[1]


@pytest.mark.gcc
def test_an_exception_inside_the_vc_handler_is_printed(model_host: Any) -> None:
    """The handler reads the string, from page 0: its own page fault is told, and RF does not stay behind on the way."""
    from guest.build import build_text

    elf = build_text("""#include "guest.h"
unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	uint64_t from = 0x18, count = 8, flags;
	(void)boot, (void)vcpu;
	asm volatile("inb $0xf8, %%al; pushfq; popq %0" : "=r"(flags) : : "rax", "memory");
	CHECK(!(flags >> 16 & 1), "flags 0x%lx", flags);
	asm volatile("rep outsb" : "+S"(from), "+c"(count) : "d"(PORT_ECHO) : "memory");
	return EXIT_PASS;
}
""")
    report = run(str(elf), type="sev-es", host=model_host, memory=16 * MIB)
    assert (report.result, report.exit_code) == ("fail", 0x7F), report.message
    assert report.console.startswith("guest exception: vector 14 (#PF) error 0x0 rip 0x")
    assert report.console.endswith(" cr2 0x18\n")


@pytest.mark.gcc
@pytest.mark.parametrize("type", ["plain", "sev", "sev-es"])
def test_nmis_one_after_the_other(model_host: Any, type: str) -> None:
    """At an IN (on SEV-ES: in the middle of the #VC handler) and while the vCPU is halted. The next one comes only when the
    host knows that the one before is done: by IRET, or on SEV-ES by the guest's word.
    """
    from guest.build import build_text
    from vmm.image import load

    elf = build_text("""#include "guest.h"
unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	(void)boot, (void)vcpu;
	nmis.wanted = true;
	for (unsigned i = 1; i <= 6; i++) {
		unsigned answer = i + 1;

		out8(PORT_ECHO, i);
		if (i & 1)
			answer = in8(PORT_ECHO);
		else
			asm volatile("hlt");
		for (unsigned patience = 0; nmis.count < i && patience < 20; patience++)
			out8(PORT_ECHO, i);
		CHECK(answer == i + 1, "IN returned %u instead of %u", answer, i + 1);
		CHECK(nmis.count == i, "%u NMIs instead of %u", nmis.count, i);
	}
	return EXIT_PASS;
}
""")

    def nmi(vcpu: Any, exit: Any) -> bool:
        halted = exit.name == "HLT"
        if halted or (exit.name == "IO" and not exit.is_out):
            vcpu.nmi()
        return halted

    with Machine(MachineConfig(load(str(elf)), model_host, type, 16 * MIB)) as machine:
        machine.handlers.append(nmi)
        outcome = machine.run(10 * PATIENCE)
        assert outcome.result == "pass", (machine.devices.console.text(), outcome.message)


@pytest.mark.gcc
def test_how_an_sev_es_guest_may_end_otherwise(model_host: Any, tmp_path: Path) -> None:
    report = run("crash", type="sev-es", host=model_host, memory=16 * MIB, arguments="triple")
    assert (report.result, "shut down" in report.message) == ("error", True), report.message
    report = run("spin", type="sev-es", host=model_host, memory=16 * MIB, timeout=0.2)
    assert (report.result, report.console) == ("timeout", "spin: spinning\n")
    report = run(flat.write(tmp_path, flat.HALT), type="sev-es", host=model_host, memory=16 * MIB)
    assert (report.result, report.message) == ("error", "the guest halted without an exit code")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            0x2E100,
            "asked for termination: an instruction that its #VC handler cannot do (reason set 14, the guest library of sevmm; code 2)",
        ),
        (0x100, "asked for termination: a general reason (reason set 0, the GHCB standard; code 0)"),
        (0x10100, "no GHCB version in common"),
        (0xFF1100, "asked for termination: a reason of its own (reason set 1, Linux; code 255)"),
        (0xFFFFFFFFFFFFF100, "a reason of its own (reason set 15; code 255)"),
        (0x12345014, "asked the host for what only SEV-SNP guests have, and KVM ended it (GHCB MSR 0x12345014)"),
    ],
)
def test_a_guest_that_gives_up_is_told_in_words(model_host: Any, tmp_path: Path, value: int, words: str) -> None:
    code = flat.load("rax", value & 0xFFFFFFFF) + flat.load("rdx", value >> 32) + flat.load("rcx", 0xC0010130) + flat.WRMSR + flat.VMGEXIT
    report = run(flat.write(tmp_path, code + flat.SPIN), type="sev-es", host=model_host, memory=16 * MIB, timeout=10)
    assert (report.result, report.exit_status, report.exits) == ("error", 70, {"SYSTEM_EVENT": 1})
    assert report.message.startswith("vCPU 0 asked ") and words in report.message


def test_a_termination_through_the_page(model_host: Any, tmp_path: Path) -> None:
    """KVM passes the page's GPA on and not the reason."""
    page = b"".join(
        flat.load("rax", value) + flat.load("rbx", boot.GHCBS + at) + b"\x48\x89\x03"  # mov [rbx], rax
        for at, value in ((0x390, 0x8000FFFE), (0x398, 0), (0x3A0, 0), (0x3F8, 7 << 50))
    )
    msr = flat.load("rax", boot.GHCBS) + flat.load("rdx", 0) + flat.load("rcx", 0xC0010130) + flat.WRMSR + flat.VMGEXIT
    report = run(flat.write(tmp_path, page + msr + flat.SPIN), type="sev-es", host=model_host, memory=16 * MIB, timeout=10)
    assert report.message == "vCPU 0 asked for termination through its GHCB at 0x400000 (KVM does not pass on why)"


def test_a_vcpu_in_reset_hold_is_parked(model_host: Any, tmp_path: Path) -> None:
    """Without an interrupt controller nothing ends a reset hold."""
    code = flat.load("rax", 6) + flat.load("rdx", 0) + flat.load("rcx", 0xC0010130) + flat.WRMSR + flat.VMGEXIT
    report = run(flat.write(tmp_path, code + flat.SPIN), type="sev-es", host=model_host, memory=16 * MIB, timeout=10)
    assert (report.message, report.exits) == ("the guest halted without an exit code", {"AP_RESET_HOLD": 1})


@pytest.mark.gcc
def test_a_sev_es_guest_without_its_boot_info_gives_up(model_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no console yet. (The host changes what is measured and what is expected, so that it is run at all.)"""
    monkeypatch.setattr(boot.BootInfo, "page", lambda self: bytes(boot.PAGE))
    report = run("hello", type="sev-es", host=model_host, memory=16 * MIB)
    assert (report.result, report.console) == ("error", "")
    assert "an exit other than CPUID before the vCPU had a GHCB page" in report.message
