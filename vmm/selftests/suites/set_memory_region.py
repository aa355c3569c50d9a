"""set_memory_region_test: memslots that are missing, wrong, too many, bound to private memory, or changed under a running guest.

The region under test is the kernel test's: slot 10, 2 MiB at 3 GiB. Where no slot is, the guest's reads are MMIO, answered with MMIO_VAL.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from errno import EEXIST, EINVAL

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.exit_types import Exit, InternalError, Mmio, Shutdown
from kvmapi.system import System
from kvmapi.vcpu import Vcpu
from kvmapi.vm import Vm
from vmm import boot
from vmm.memory import MAP_NORESERVE
from vmm.selftests import hostmem
from vmm.selftests.api import Bench, MachineFactory, Slot, Subtest, check_equal, expect_errno, runs_on, skip
from vmm.selftests.waiting import wait_until

SLOT, GPA, SIZE = 10, 3 << 30, 2 << 20
PAGE = 4096
MMIO_VAL = 0xBEEF
GP_VECTOR, GATE_SIZE, DELIVERY_EV = 13, 16, 3
LOOPS = 10
QUIRK_SLOT_ZAP_ALL = 1 << 7
LOG_DIRTY, READONLY, GUEST_MEMFD = kvm.KVM_MEM_LOG_DIRTY_PAGES, kvm.KVM_MEM_READONLY, kvm.KVM_MEM_GUEST_MEMFD


def test_zero_memory_regions(vm: Vm) -> None:
    """A vCPU of a VM without any memory cannot fetch its first instruction: KVM says so, and nothing worse."""
    with vm.create_vcpu(0) as vcpu:
        vm.ioctl(ioctls.KVM_SET_NR_MMU_PAGES, 64)
        exit = vcpu.exit(vcpu.run())
        assert isinstance(exit, InternalError), exit


VECTORING = r"""
#include "ucall.h"

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	const struct { uint16_t limit; uint64_t base; } __attribute__((packed)) idt = { 0xfff, 0xc0000000 };

	(void)boot;
	(void)vcpu;
	ucall_sync(1);
	asm volatile("lidt %0; movq (%1), %%rax" : : "m"(idt), "r"(0xfff0000000000000) : "rax", "memory");
	return 1;
}
"""


@runs_on("plain", needs={"hypercall"})
def test_mmio_during_vectoring(machine: MachineFactory) -> None:
    """Reading a gate of an IDT that is MMIO is not possible; the exit tells the gate's address.

    Needs a KVM with SVM or VMX below it, as hypercall exits do: a paravirtual one reports no delivery.
    """
    m = machine(VECTORING, prepare=lambda m: m.tables.map(GPA, GPA, PAGE, private=False))
    m.sync(stage=1)
    exit = m.until(InternalError)
    assert exit.suberror == DELIVERY_EV, exit
    assert len(exit.data) != 4, f"the data should tell the address and more, not {len(exit.data)} numbers"
    check_equal(exit.data[3], GPA + GP_VECTOR * GATE_SIZE, "the GPA of the gate")


@runs_on("sw-protected", "plain")
def test_invalid_memory_region_flags(system: System, vm: Vm, subtest: Subtest) -> None:
    """Each flag of a memslot that does not exist, or not in that version of the ioctl, or not with that other flag."""
    private = system.check_extension(caps.KVM_CAP_MEMORY_ATTRIBUTES) & kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE
    known = LOG_DIRTY | READONLY | (GUEST_MEMFD if private else 0)
    for bit in range(32):
        flag = 1 << bit
        with subtest(f"KVM_SET_USER_MEMORY_REGION bit {bit}"):
            if not flag & known or flag == GUEST_MEMFD:
                with expect_errno(EINVAL):
                    vm.set_user_memory_region(SLOT, GPA, SIZE, 0, flags=flag)
        with subtest(f"KVM_SET_USER_MEMORY_REGION2 bit {bit}"):
            if not flag & known:
                with expect_errno(EINVAL):
                    vm.set_user_memory_region2(SLOT, GPA, SIZE, 0, flags=flag, guest_memfd=system.fd if flag == GUEST_MEMFD else -1)
    if not private:
        return
    with vm.create_guest_memfd(SIZE) as memfd:
        for name, flag in (("LOG_DIRTY_PAGES", LOG_DIRTY), ("READONLY", READONLY)):
            with subtest(f"GUEST_MEMFD with {name}"), expect_errno(EINVAL):
                vm.set_user_memory_region2(SLOT, GPA, SIZE, 0, flags=flag | GUEST_MEMFD, guest_memfd=memfd.fd)


@runs_on("sw-protected", "plain")
def test_add_max_memory_regions(vm: Vm) -> None:
    """As many slots as KVM_CAP_NR_MEMSLOTS says, each with memory of its own, and not one more."""
    most = vm.check_extension(caps.KVM_CAP_NR_MEMSLOTS)
    assert most > 0
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        view = mmap.mmap(-1, (most + 1) * SIZE, flags=flags)  # address space, no memory
    except OSError as refusal:
        skip(f"the test needs {(most + 1) * SIZE >> 30} GiB of address space: {refusal.strerror} (ulimit -v, vm.overcommit_memory)")
    hva = hostmem.address_of(view)
    try:
        add = vm.set_user_memory_region
        for slot in range(most):
            add(slot, slot * SIZE, SIZE, hva + slot * SIZE)
        with expect_errno(EINVAL):
            add(most, most * SIZE, SIZE, hva + most * SIZE)
    finally:
        vm.close()  # before the memory goes
        view.close()


# ---- private memory
@runs_on("sw-protected")
def test_add_private_memory_region(system: System, vm: Vm, subtest: Subtest) -> None:
    """A slot takes a guest_memfd of its own VM, from whole pages on, and nothing else for one."""

    def add(to: Vm, fd: int, offset: int = 0) -> None:
        to.set_user_memory_region2(SLOT, GPA, SIZE, 0, guest_memfd=fd, guest_memfd_offset=offset)

    ordinary = vm.host.memfd_create("ordinary", 0)
    try:
        for name, fd in (("/dev/kvm", system.fd), ("the VM", vm.fd), ("an ordinary memfd", ordinary)):
            with subtest(f"fd of {name}"), expect_errno(EINVAL):
                add(vm, fd)
    finally:
        vm.host.close(ordinary)
    with system.create_vm(vm.type) as other, other.create_guest_memfd(SIZE) as theirs:
        with subtest("another VM's guest_memfd"), expect_errno(EINVAL):
            add(vm, theirs.fd)
        with subtest("in the other VM"):
            add(other, theirs.fd)
    with vm.create_guest_memfd(SIZE) as memfd:
        with subtest("unaligned offsets"):
            for offset in range(1, PAGE):
                with expect_errno(EINVAL):
                    add(vm, memfd.fd, offset)
        with subtest("offset 0"):
            add(vm, memfd.fd)


@runs_on("sw-protected")
def test_add_overlapping_private_memory_regions(vm: Vm, subtest: Subtest) -> None:
    """No two slots share a GPA, or a page of a guest_memfd; what a deleted slot held is free again, but no more than that."""
    with vm.create_guest_memfd(5 * SIZE) as memfd:

        def add(slot: int, gpa: int, offset: int) -> None:
            vm.set_user_memory_region2(slot, gpa, 2 * SIZE, 0, guest_memfd=memfd.fd, guest_memfd_offset=offset)

        add(SLOT, GPA, 0)
        add(SLOT + 1, 2 * GPA, 2 * SIZE)
        with subtest("delete with the flag GUEST_MEMFD and no fd"):
            vm.set_user_memory_region2(SLOT, GPA, 0, 0, flags=GUEST_MEMFD)
        for name, gpa, offset in (
            ("the front of the other slot's part of the file", GPA, SIZE),
            ("the back of the other slot's part of the file", GPA, 3 * SIZE),
            ("the front of the other slot's GPAs", 2 * GPA - SIZE, 0),
            ("the back of the other slot's GPAs", 2 * GPA + SIZE, 0),
        ):
            with subtest(name), expect_errno(EEXIST):
                add(SLOT, gpa, offset)


# ---- under a running guest
LIVE = r"""
#include "ucall.h"

#define WORD		(*(volatile uint64_t *)0xc0000000UL)
#define MMIO_VAL	0xbeefUL

static volatile uint64_t *beats, *stop;

/* Reads until the word is something else, and counts for the host to see that it reads. */
static uint64_t spin_while(uint64_t value)
{
	uint64_t seen;

	do {
		++*beats;
		seen = WORD;
	} while (seen == value);
	return seen;
}

static void start(const struct boot_info *boot)
{
	beats = (uint64_t *)boot->test_area;
	stop = beats + 1;
	ucall_sync(1);
}
"""

MOVE = r"""
unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	uint64_t seen;

	(void)vcpu;
	start(boot);
	seen = spin_while(0);			/* the slot is moved: no slot for a moment, then its second page */
	GUEST_ASSERT(seen == 1 || seen == MMIO_VAL);
	if (seen == MMIO_VAL)
		GUEST_ASSERT_EQ(spin_while(MMIO_VAL), 1);
	ucall_sync(2);
	while (!*stop) {			/* the slot moves back, with 1 in its first page by then */
		++*beats;
		seen = WORD;
		GUEST_ASSERT(seen == 1 || seen == MMIO_VAL);
	}
	GUEST_ASSERT_EQ(WORD, 1);
	ucall_sync(3);
	GUEST_ASSERT_EQ(WORD, 7);		/* and it is the first page */
	return 0;
}
"""

DELETE = r"""
extern char final_start[], final_end[];

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	(void)vcpu;
	start(boot);
	GUEST_ASSERT_EQ(spin_while(0), MMIO_VAL);
	ucall_sync(2);
	GUEST_ASSERT_EQ(spin_while(MMIO_VAL), 0);
	ucall_sync(3);
	GUEST_ASSERT_EQ(spin_while(0), MMIO_VAL);
	ucall_sync(4, (uint64_t)final_start, (uint64_t)final_end);
	asm volatile(".globl final_start, final_end\n"		/* reads MMIO until it is no more there to do so */
		"final_start: movq (%0), %%rax\n"
		"jmp final_start\n"
		"final_end:" : : "r"(&WORD) : "rax", "memory");
	return 1;
}
"""


@runs_on("plain")
def test_move_memory_region(machine: MachineFactory, subtest: Subtest) -> None:
    """A guest that reads while its slot moves sees the one place or the other, or no memory, and never what it should not."""
    for name, loop in loops(machine, LIVE + MOVE):
        with subtest(name):
            move(loop)


@runs_on("plain")
def test_delete_memory_region(machine: MachineFactory, subtest: Subtest) -> None:
    """A guest that reads while its slot goes and comes sees MMIO and memory in turn; without slot 0 it cannot go on."""
    for name, loop in loops(machine, LIVE + DELETE):
        with subtest(name):
            final_loop = delete(loop)
            with subtest(f"{name}, slot 0"):
                delete_primary(loop, *final_loop)


def loops(machine: MachineFactory, text: str) -> Iterator[tuple[str, Bench]]:
    """Guests at their first SYNC, LOOPS with the quirk that a deleted slot zaps all mappings, and as many without it."""
    for quirk in (True, False):
        for number in range(LOOPS):
            m = machine(text, slots=[Slot(SLOT, GPA, SIZE, page=SIZE)])
            m.handlers.append(mmio)
            offered = m.vm.check_extension(caps.KVM_CAP_DISABLE_QUIRKS2) & QUIRK_SLOT_ZAP_ALL
            if not quirk and not offered:
                return
            if not quirk:
                m.vm.enable_cap(caps.KVM_CAP_DISABLE_QUIRKS2, QUIRK_SLOT_ZAP_ALL)
            m.sync(stage=1)
            yield f"loop {number}{'' if quirk else ' without SLOT_ZAP_ALL'}", m
            m.close()


def mmio(vcpu: Vcpu, exit: Exit) -> bool:
    """The only MMIO there is: the word, read whole."""
    if not isinstance(exit, Mmio):
        return False
    assert not exit.is_write and exit.length == 8 and exit.phys_addr == GPA, exit
    vcpu.answer_mmio(exit, MMIO_VAL.to_bytes(8, "little"))
    return True


def move(m: Bench) -> None:
    """One guest, moved there and back."""
    hva = m.memory.hva(GPA)
    m.memory.write(GPA + PAGE, word(1))
    with m.background(lambda: m.sync(stage=2)) as run:
        heartbeat(m)
        m.vm.set_user_memory_region(SLOT, GPA - PAGE, SIZE, hva)
        m.memory.write(GPA, word(2))  # the host's view stays; the guest's address is the second page now
        run.result()
    with m.background(lambda: m.sync(stage=3)) as run:
        heartbeat(m)
        m.memory.write(GPA, word(1))
        m.vm.set_user_memory_region(SLOT, GPA, SIZE, hva)
        heartbeat(m)
        m.memory.write(boot.TEST_AREA + 8, word(1))  # stop
        run.result()
    m.memory.write(GPA, word(7))
    m.done()


def delete(m: Bench) -> tuple[int, int]:
    """One guest whose slot is deleted, made again and deleted; returns where the loop is in which it then reads MMIO."""
    hva = m.memory.hva(GPA)
    for stage, size in ((2, 0), (3, SIZE), (4, 0)):
        with m.background(lambda stage=stage: m.sync(stage)) as run:  # type: ignore[misc]
            heartbeat(m)
            m.vm.set_user_memory_region(SLOT, GPA, size, hva)
            reached = run.result()
    return reached.args[0], reached.args[1]


def delete_primary(m: Bench, start: int, end: int) -> None:
    """The same guest loses the slot with its code and its tables."""
    if os.environ.get("SEVMM_IN_LAB") == "1":
        skip("the lab's CPU, which is QEMU's, may try for ever to deliver a #PF through an IDT that is no more")
    with m.background(lambda: until_no_mmio(m)) as run:
        seen = m.counts["MMIO"]
        wait_until(lambda: m.counts["MMIO"] > seen + 2, m.patience, "the guest reads on")
        m.vm.set_user_memory_region(0, 0, 0, 0)
        exit = run.result()
    if not isinstance(exit, Shutdown):  # after which kvm_amd has reset the vCPU
        assert isinstance(exit, InternalError), exit
        assert start <= m.vcpus[0].get_regs().rip < end, "RIP should be in the loop that lost its memory"


def until_no_mmio(m: Bench) -> Exit:
    """Answer the word's MMIO until another exit comes."""
    while mmio(m.vcpus[0], exit := m.step()):
        pass
    return exit


def heartbeat(m: Bench) -> None:
    """Wait until the guest reads on: it has counted twice from now."""
    goal = beats(m) + 2
    wait_until(lambda: beats(m) >= goal, m.patience, "the guest reads on")


def beats(m: Bench) -> int:
    """How often the guest has read the word."""
    return int.from_bytes(m.memory.read(boot.TEST_AREA, 8), "little")


def word(value: int) -> bytes:
    """Eight bytes of guest memory."""
    return value.to_bytes(8, "little")
