"""sev_smoke_test: SEV and SEV-ES guests are launched with debugging allowed and not, know what they are, and end as they should.

The kernel's test ends its SEV-ES guest by a termination request, because it has no GHCB; so does this one, and with the GHCB of guest/lib
the guest looks at CPUID first. SEV-SNP, which the kernel's test also covers, is a VM type this project does not have. Of the registers
that a VMSA carries into the guest, x87 and SSE are looked at; the AVX part is not.
"""

from __future__ import annotations

import struct

from kvmapi.abi import kvm
from kvmapi.abi import sev as s
from kvmapi.abi.vcpu import kvm_regs, kvm_sregs, kvm_xsave
from kvmapi.exit_types import Shutdown, SystemEvent
from kvmapi.sev import SevPlatform
from kvmapi.system import System
from kvmapi.vmsa import build_vmsa
from vmm import boot
from vmm.selftests.api import Bench, Case, MachineFactory, Subtest, check_equal, runs_on
from vmm.selftests.sev_vms import SevGuest

GHCB_MSR_TERM_REQ = 0x100

REGISTERS = r"""
#include "ucall.h"

#define MSR_EFER	0xc0000080
#define MSR_SEV		0xc0010131
#define MSR_GHCB_PAGE	0xc0010130
#define TERM_REQ	0x100

static uint64_t read_msr(uint32_t msr)
{
	uint32_t low, high;

	asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
	return (uint64_t)high << 32 | low;
}

static void write_msr(uint32_t msr, uint64_t value)
{
	asm volatile("wrmsr" : : "c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)) : "memory");
}

#define KEEPS(reg)								\
	do {									\
		uint64_t before, after;						\
		asm volatile("movq %%" reg ", %0; movq %0, %%" reg "; movq %%" reg ", %1" : "=&r"(before), "=r"(after) : : "memory"); \
		GUEST_ASSERT_EQ(after, before);					\
	} while (0)

static void registers_keep_their_values(void)
{
	uint64_t efer = read_msr(MSR_EFER);

	write_msr(MSR_EFER, efer);
	GUEST_ASSERT_EQ(read_msr(MSR_EFER), efer);
	KEEPS("cr0");
	KEEPS("cr3");
	KEEPS("cr4");
	KEEPS("cr8");
}

static uint32_t sev_features(void)
{
	uint32_t eax = 0x8000001f, ebx, ecx = 0, edx;

	asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
	return eax;
}

static inline void terminate(void)
{
	write_msr(MSR_GHCB_PAGE, TERM_REQ);
	asm volatile("rep; vmmcall" : : : "memory");	/* VMGEXIT */
}
"""

SEV_CODE = r"""
unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	(void)boot;
	(void)vcpu;
	GUEST_ASSERT(sev_features() & 1 << 1);
	GUEST_ASSERT(read_msr(MSR_SEV) & 1 << 0);
	registers_keep_their_values();
	(void)terminate;
	return 0;
}
"""

SEV_ES_CODE = r"""
unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	(void)boot;
	(void)vcpu;
	GUEST_ASSERT((sev_features() & 0xa) == 0xa);
	GUEST_ASSERT((read_msr(MSR_SEV) & 3) == 3);
	registers_keep_their_values();
	terminate();
	return 1;
}
"""

SHUTDOWN_CODE = r"""
#include "ucall.h"

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	const struct { uint16_t limit; uint64_t base; } __attribute__((packed)) none = { 0, 0 };

	(void)boot;
	(void)vcpu;
	ucall_sync(1);
	asm volatile("lidt %0; ud2" : : "m"(none));
	return 1;
}
"""

XSAVE_CODE = r"""
unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	(void)vcpu;
	asm volatile("fxsave64 (%0)" : : "r"(boot->test_area) : "memory");	/* the library is compiled without x87 and SSE */
	(void)sev_features;
	(void)registers_keep_their_values;
	terminate();
	return 1;
}
"""


def policies(es: bool) -> list[tuple[str, int]]:
    """The two that each guest is launched with."""
    base = s.SEV_POLICY_ES if es else 0
    return [("NODBG", base | s.SEV_POLICY_NODBG), ("debugging allowed", base)]


@runs_on("sev", "sev-es")
def test_launch(system: System, case: Case, subtest: Subtest) -> None:
    """LAUNCH_START to LAUNCH_FINISH, with the policy and the state after each step."""
    with SevPlatform(system.host) as platform:
        for name, policy in policies(case.type == "sev-es"):
            with subtest(name):
                guest = SevGuest(system, platform, type=case.vm_type)
                try:
                    guest.init().add_vcpus(1).add_memory(bytes(range(256)) * 32).start(policy).measure().finish()
                finally:
                    guest.close()


@runs_on("sev")
def test_sev(machine: MachineFactory, subtest: Subtest) -> None:
    """A SEV guest knows that it is one, and its control registers keep what is written."""
    for name, policy in policies(es=False):
        with subtest(name):
            m = machine(REGISTERS + SEV_CODE, policy=policy)
            check_launch(m, policy)
            m.done()


@runs_on("sev-es")
def test_sev_es(machine: MachineFactory, subtest: Subtest) -> None:
    """The same for SEV-ES; the guest ends by asking for its termination."""
    for name, policy in policies(es=True):
        with subtest(name):
            m = machine(REGISTERS + SEV_ES_CODE, policy=policy)
            check_launch(m, policy)
            check_termination(m)


@runs_on("sev-es")
def test_sev_shutdown(machine: MachineFactory) -> None:
    """An exception that no IDT takes ends in KVM_EXIT_SHUTDOWN, though nobody can see the guest's registers."""
    m = machine(SHUTDOWN_CODE, policy=s.SEV_POLICY_ES)
    m.sync(stage=1)
    m.until(Shutdown)


@runs_on("sev-es")
def test_sync_vmsa(machine: MachineFactory, subtest: Subtest) -> None:
    """What KVM_SET_XSAVE gave a vCPU before the launch is in the guest's registers at its first instruction."""
    image = fxsave_image()

    def prepare(m: Bench) -> None:
        regs, sregs = kvm_regs(), kvm_sregs()
        boot.set_registers(regs, m.config.image.entry, 0)
        boot.set_system_registers(sregs, 0, 1)
        m.vcpus[0].set_xsave(xsave_of(image))
        m._areas[0] = build_vmsa(regs, sregs, bytes(xsave_of(image)))  # or the launch finds a measurement nobody expects

    for name, policy in policies(es=True):
        with subtest(name):
            m = machine(REGISTERS + XSAVE_CODE, policy=policy, prepare=prepare)
            check_launch(m, policy)
            check_termination(m)
            found = m.memory.read(boot.TEST_AREA, 416)
            check_equal(found[:28], image[:28], "FCW, FSW, FTW, FOP, FIP, FDP, MXCSR")
            check_equal(found[32:416], image[32:416], "the x87 and SSE registers")


def check_launch(m: Bench, policy: int) -> None:
    """The launch went through with this policy, and measured what it should."""
    launch = m.launch
    assert launch is not None and launch.policy == policy and launch.match


def check_termination(m: Bench) -> None:
    """The guest ends by KVM_SYSTEM_EVENT_SEV_TERM, with the GHCB MSR's value."""
    event = m.until(SystemEvent)
    check_equal(event.type, kvm.KVM_SYSTEM_EVENT_SEV_TERM, "the system event")
    check_equal(event.data, (GHCB_MSR_TERM_REQ,), "its data")


def fxsave_image() -> bytes:
    """x87 with pi on its stack, XMM4 all ones; everything else as after reset."""
    image = bytearray(512)
    struct.pack_into("<HHBxHQQII", image, 0, 0x37F, 7 << 11, 0x80, 0, 0, 0, 0x1F80, 0xFFFF)
    struct.pack_into("<QH", image, 32, 0xC90FDAA22168C000, 0x4000)
    image[160 + 16 * 4 : 160 + 16 * 5] = b"\xff" * 16
    return bytes(image)


def xsave_of(image: bytes) -> kvm_xsave:
    """An XSAVE image of x87 and SSE."""
    return kvm_xsave.from_buffer_copy((image + (3).to_bytes(8, "little")).ljust(4096, b"\0"))
