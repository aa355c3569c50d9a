"""private_mem_conversions_test: explicit conversions between shared and private memory, byte by byte, and holes in private memory.

Guest and host play one script. Before and after each conversion the guest checks what it reads, and the host what it sees through its own
mapping, which shows shared memory and never private. The hypercall's attributes are a convention between this guest and this host, not
KVM's: whether to change the memory attributes, to what, and whether to fallocate the guest_memfd too (shared: punch, private: allocate).

Every vCPU has 2 MiB and 4 KiB of its own, all in one guest_memfd, which one or more memslots share.
"""

from __future__ import annotations

import mmap
import os
from contextlib import ExitStack

from kvmapi.abi import kvm
from kvmapi.exit_types import Exit, Hypercall
from kvmapi.vcpu import Vcpu
from vmm.selftests import hostmem
from vmm.selftests.api import Bench, MachineFactory, Sync, check_equal, fail, runs_on

BASE, CHUNK = 4 << 30, 4 << 20
FIRST_SLOT = 10
SET_ATTRIBUTES, TO_SHARED, DO_FALLOCATE = 1, 2, 4
SYNC_SHARED, SYNC_PRIVATE = 1, 2

GUEST = r"""
#include "hypercall.h"
#include "ucall.h"

#define BASE	0x100000000UL
#define CHUNK	0x400000UL
#define SIZE	(PAGE_2M + PAGE_SIZE)

enum { SET_ATTRIBUTES = 1, TO_SHARED = 2, DO_FALLOCATE = 4 };	/* this test's own attributes */
enum { SYNC_SHARED = 1, SYNC_PRIVATE = 2 };

static const struct { uint64_t offset, size; } ranges[] = {
	{ 0, PAGE_SIZE }, { 0, PAGE_2M }, { PAGE_SIZE, PAGE_SIZE }, { PAGE_SIZE, PAGE_2M }, { PAGE_2M, PAGE_SIZE },
	{ 3 * PAGE_SIZE, 4 * PAGE_SIZE },	/* not in the kernel's list: the only one in which odd pages convert back */
};
#define RANGES		(sizeof(ranges) / sizeof(ranges[0]))
#define FINE_LIMIT	(4 * PAGE_SIZE)		/* the kernel's test looks at single pages only in a range of one page */

static void expect(uint64_t gpa, uint64_t size, uint8_t byte)
{
	uint64_t word = byte * 0x0101010101010101UL;

	for (const uint64_t *at = (uint64_t *)gpa; at < (uint64_t *)(gpa + size); at++)
		CHECK(*at == word, "0x%lx holds 0x%lx, expected 0x%lx", (uint64_t)at, *at, word);
}

static void set(uint64_t gpa, uint64_t size, uint8_t byte)
{
	memset((void *)gpa, byte, size);
}

static void convert(uint64_t gpa, uint64_t size, uint64_t attributes)
{
	GUEST_ASSERT_EQ((uint64_t)map_gpa_range(gpa, size / PAGE_SIZE, attributes), 0);
}

/* The host must see `current` in [gpa, gpa + size), and writes `next`. */
static void sync_shared(unsigned vcpu, uint64_t gpa, uint64_t size, uint8_t current, uint8_t next)
{
	ucall_sync_on(vcpu, SYNC_SHARED, gpa, size, current, next);
	expect(gpa, size, next);
}

/* The host's mapping must show `shared`, whatever the guest's private memory holds. */
static void sync_private(unsigned vcpu, uint64_t gpa, uint64_t size, uint8_t shared)
{
	ucall_sync_on(vcpu, SYNC_PRIVATE, gpa, size, shared);
}

static void private_part(unsigned vcpu, uint64_t base, uint64_t gpa, uint64_t size, uint64_t allocate)
{
	set(gpa, size, 0x22);
	sync_private(vcpu, gpa, size, 0x11);
	expect(gpa, size, 0x22);
	expect(base, gpa - base, 0xcc);
	expect(gpa + size, base + SIZE - gpa - size, 0xcc);
	for (uint64_t page = 0; page < size; page += PAGE_SIZE) {
		if (page / PAGE_SIZE % 2) {
			convert(gpa + page, PAGE_SIZE, SET_ATTRIBUTES | TO_SHARED | allocate);
			sync_shared(vcpu, gpa + page, PAGE_SIZE, 0x11, 0x33);
		} else {
			sync_private(vcpu, gpa + page, PAGE_SIZE, 0x11);
		}
	}
}

static void explicit_conversion(unsigned vcpu, uint64_t base, uint64_t allocate)
{
	set(base, SIZE, 0xaa);
	sync_shared(vcpu, base, SIZE, 0xaa, 0xcc);
	for (unsigned i = 0; i < RANGES; i++) {
		uint64_t gpa = base + ranges[i].offset, size = ranges[i].size;

		set(gpa, size, 0x11);
		convert(gpa, size, SET_ATTRIBUTES | allocate);
		if (size > FINE_LIMIT)
			set(gpa, PAGE_SIZE, 0x22);
		else
			private_part(vcpu, base, gpa, size, allocate);
		convert(gpa, size, SET_ATTRIBUTES | TO_SHARED | allocate);
		set(gpa, size, 0x33);
		sync_shared(vcpu, gpa, size, 0x33, 0x44);
		set(gpa, size, 0xcc);
		convert(base, SIZE, SET_ATTRIBUTES | TO_SHARED | DO_FALLOCATE);
	}
}

static void punch_hole(uint64_t base, bool precise)
{
	convert(base, SIZE, SET_ATTRIBUTES);
	for (unsigned i = 0; i < RANGES; i++) {
		uint64_t gpa = base + ranges[i].offset, size = ranges[i].size;
		uint64_t from = precise ? gpa : base, length = precise ? size : SIZE;

		convert(base, SIZE, TO_SHARED | DO_FALLOCATE);
		set(from, length, 0xcc);
		expect(from, length, 0xcc);
		convert(gpa, size, TO_SHARED | DO_FALLOCATE);
		expect(gpa, size, 0);
		expect(from, gpa - from, 0xcc);
		expect(gpa + size, from + length - gpa - size, 0xcc);
	}
}

static void script(const struct boot_info *boot, unsigned vcpu)
{
	uint64_t base = BASE + vcpu * CHUNK;

	if (argument(boot, "explicit"))
		explicit_conversion(vcpu, base, argument(boot, "fallocate") ? DO_FALLOCATE : 0);
	if (argument(boot, "punch"))
		punch_hole(base, argument(boot, "precise"));
	ucall_done_on(vcpu);
}

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	script(boot, vcpu);
	return 0;
}

void guest_secondary(const struct boot_info *boot, unsigned vcpu)
{
	script(boot, vcpu);
}
"""

on_private_memory = runs_on("sw-protected", needs={"hypercall"})


@on_private_memory
def test_explicit_conversion(machine: MachineFactory) -> None:
    """Conversions change the attributes only; the guest_memfd allocates on first touch."""
    Conversions(machine, "explicit").run()


@on_private_memory
def test_explicit_conversion_fallocate(machine: MachineFactory) -> None:
    """Conversions also allocate and punch the guest_memfd."""
    Conversions(machine, "explicit fallocate").run()


@on_private_memory
def test_punch_hole(machine: MachineFactory) -> None:
    """A hole punched into private memory that is all there reads zeroes; around it nothing changes."""
    Conversions(machine, "punch").run()


@on_private_memory
def test_punch_hole_precise(machine: MachineFactory) -> None:
    """The same where only the punched range was there."""
    Conversions(machine, "punch precise").run()


@on_private_memory
def test_two_memslots(machine: MachineFactory) -> None:
    """Ranges that begin in one memslot and end in the next."""
    Conversions(machine, "explicit fallocate", slots=2).run()


@on_private_memory
def test_two_vcpus(machine: MachineFactory) -> None:
    """Two vCPUs convert at the same time, each its own."""
    Conversions(machine, "explicit", vcpus=2).run()


class Conversions:
    """The host's half: memory that all vCPUs share, and what it does about their hypercalls and SYNCs."""

    def __init__(self, machine: MachineFactory, arguments: str, vcpus: int = 1, slots: int = 1) -> None:
        self.size = vcpus * CHUNK
        self._slots = slots
        self._stack = ExitStack()
        with self._stack:
            self.bench = machine(GUEST, vcpus=vcpus, arguments=arguments, prepare=self._prepare)
            self._stack = self._stack.pop_all()
        self.bench.handlers.append(self.hypercall)

    def _prepare(self, m: Bench) -> None:
        """One memfd for the shared half, one guest_memfd for the private one, cut into memslots."""
        fd = m.host.memfd_create("shared-half", 0)
        self._stack.callback(m.host.close, fd)
        os.ftruncate(fd, self.size)
        self.shared: mmap.mmap = self._stack.enter_context(m.host.mmap(fd, self.size))
        self.memfd = self._stack.enter_context(m.vm.create_guest_memfd(self.size))
        hva, piece = hostmem.address_of(self.shared), self.size // self._slots
        for number in range(self._slots):
            at = number * piece
            m.vm.set_user_memory_region2(
                FIRST_SLOT + number, BASE + at, piece, hva + at, guest_memfd=self.memfd.fd, guest_memfd_offset=at
            )  # fmt: skip
        m.tables.map(BASE, BASE, self.size, private=False, page=2 << 20)

    def run(self) -> None:
        """All vCPUs to their ends; then the file outlives its VM."""
        m = self.bench
        with self._stack:
            with ExitStack() as runs:
                for vcpu in range(1, len(m.vcpus)):
                    runs.enter_context(m.background(lambda vcpu=vcpu: self.serve(vcpu), vcpu))  # type: ignore[misc]
                self.serve(0)
            m.close()
            self.memfd.punch_hole(0, self.size)
            self.memfd.allocate(0, self.size)

    def serve(self, vcpu: int) -> None:
        """Answer one vCPU's SYNCs until it is done."""
        while isinstance(said := self.bench.next(vcpu), Sync):
            gpa, size, current, new, _ = said.args
            start, what = gpa - BASE, "private" if said.stage == SYNC_PRIVATE else "shared"
            name = f"the host's view of [{gpa:#x}, {gpa + size:#x}), which is {what}"
            check_equal(self.shared[start : start + size], bytes([current]) * size, name)
            if said.stage == SYNC_SHARED:
                self.shared[start : start + size] = bytes([new]) * size
            elif said.stage != SYNC_PRIVATE:
                fail(f"the guest sent {said}")

    def hypercall(self, vcpu: Vcpu, exit: Exit) -> bool:
        """This test's reading of MAP_GPA_RANGE."""
        if not isinstance(exit, Hypercall):
            return False
        check_equal(exit.nr, kvm.KVM_HC_MAP_GPA_RANGE, "the hypercall's number")
        gpa, pages, attributes, *_ = exit.args
        size, to_shared = pages * 4096, bool(attributes & TO_SHARED)
        if attributes & DO_FALLOCATE:
            (self.memfd.punch_hole if to_shared else self.memfd.allocate)(gpa - BASE, size)
        if attributes & SET_ATTRIBUTES:
            self.bench.vm.set_memory_attributes(gpa, size, 0 if to_shared else kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE)
        vcpu.answer_hypercall(0)
        return True
