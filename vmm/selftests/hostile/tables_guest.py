"""A guest whose page tables are hostile: they loop, lead anywhere, lie where no memory is, and take themselves away while they are used.

It checks what a processor promises: which walks end in memory, and which in #PF with which error code.
"""

from __future__ import annotations

from vmm.selftests.hostile.guests import DRAW

TABLES = rf"""
#include "paging.h"
#include "ucall.h"
{DRAW}
#define PAGE_FAULT	14
#define FAULT_RESERVED	8
#define ENTRIES		512
#define USABLE		(PTE_PRESENT | PTE_WRITE)
#define SLOT_OF(n)	((uint64_t)(n) << 39)

static uint64_t loop[ENTRIES] __attribute__((aligned(4096)));
static uint64_t noise[ENTRIES] __attribute__((aligned(4096)));
static volatile uint64_t witness[ENTRIES] __attribute__((aligned(4096)));

static bool touch(uint64_t address, struct caught *caught)
{{
	return !EXPECT_EXCEPTION(PAGE_FAULT, caught, "movq (%%rsi), %%rax", "S"(address));
}}

static void reload(void)
{{
	uint64_t cr3 = read_cr3();

	asm volatile("movq %0, %%cr3" : : "r"(cr3) : "memory");
}}

/* A table all of whose entries lead back to it, at every level, and the top table as a table of its own lower levels. */
static unsigned loops(uint64_t *top, uint64_t c_mask)
{{
	struct caught caught;
	unsigned read = 0;

	for (unsigned i = 0; i < ENTRIES; i++)
		loop[i] = (uint64_t)loop | USABLE | c_mask;
	top[1] = (uint64_t)loop | USABLE | c_mask;
	top[2] = (uint64_t)top | USABLE | c_mask;
	reload();
	for (unsigned i = 0; i < 200; i++) {{
		uint64_t address = SLOT_OF(1) | (draw() & 0x7ffffff000UL) | (i % ENTRIES) * 8;

		CHECK(touch(address, &caught), "0x%lx, where all tables are one, faults with 0x%lx", address, caught.error);
		CHECK((*(volatile uint64_t *)address & ~0x60UL) == ((uint64_t)loop | USABLE | c_mask), "0x%lx is not the table", address);
		read += touch(SLOT_OF(2) | (draw() & 0x7ffffff000UL), &caught);
	}}
	/* Every level of this walk is entry 5: the store takes away the table it goes through. */
	*(volatile uint64_t *)(SLOT_OF(1) | 5UL << 30 | 5UL << 21 | 5UL << 12 | 5 * 8) = 0;
	reload();
	CHECK(!touch(SLOT_OF(1) | 5UL << 30, &caught), "an entry that was taken away is still used");
	return read;
}}

/* Entries that lead anywhere: reserved bits, into this program, and where devices may be: beyond all memory, into the hole. */
static unsigned anywhere(uint64_t *top, uint64_t c_mask, bool devices)
{{
	struct caught caught;
	unsigned read = 0;

	for (unsigned round = 0; round < 8; round++) {{
		for (unsigned i = 0; i < ENTRIES; i++) {{
			const uint64_t ends[] = {{
				draw() & 0xfff000, (uint64_t)noise, (uint64_t)witness, 0xd0000000, 0xc0000000 + (draw() & 0xfff000),
			}};

			noise[i] = ends[draw() % (devices ? COUNT(ends) : 3)] | USABLE | (draw() & 0x1e) | c_mask;
			if (draw() % 8 == 0)
				noise[i] = devices ? draw() : 0;
		}}
		top[3] = (uint64_t)noise | USABLE | c_mask;
		top[4] = (uint64_t)loop | USABLE | PTE_LARGE | c_mask;
		reload();
		for (unsigned i = 0; i < 40; i++) {{
			/* The last level only: a table outside of memory is another test. */
			uint64_t address = SLOT_OF(5) | draw() % ENTRIES << 12;

			top[5] = (uint64_t)loop | USABLE | c_mask;
			loop[0] = (uint64_t)loop | USABLE | c_mask;
			loop[1] = (uint64_t)noise | USABLE | c_mask;
			read += touch(address | 1UL << 21, &caught);
			CHECK(!touch(SLOT_OF(4) | (draw() & 0x7fffffffffUL), &caught), "an entry with reserved bits is used");
			CHECK(caught.error & FAULT_RESERVED, "an entry with reserved bits: error 0x%lx", caught.error);
		}}
	}}
	return read;
}}

/* Tables where no memory is: nothing is mapped there. */
static void nowhere(uint64_t *top, uint64_t c_mask)
{{
	static const uint64_t places[] = {{ 0xc0000000, 0xd0000000, 1UL << 40 }};
	struct caught caught;

	for (unsigned i = 0; i < COUNT(places); i++) {{
		top[6] = places[i] | USABLE | c_mask;
		reload();
		CHECK(!touch(SLOT_OF(6) | (draw() & 0x7fffffffffUL), &caught), "a table at 0x%lx, where no memory is, is used", places[i]);
		CHECK(!(caught.error & 1), "a table at 0x%lx, where no memory is: error 0x%lx", places[i], caught.error);
	}}
}}

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{{
	bool devices = boot->vm_type != VM_SEV_ES;	/* there #VC asks for them, and its handler trusts no such tables */
	uint64_t *top = (uint64_t *)boot->pml4;
	unsigned first, second;

	(void)vcpu;
	for (unsigned i = 0; i < ENTRIES; i++)
		witness[i] = i * 0x0101010101010101UL;
	first = loops(top, boot->c_mask);
	second = anywhere(top, boot->c_mask, devices);
	if (devices)
		nowhere(top, boot->c_mask);
	for (unsigned i = 1; i < 8; i++)
		top[i] = 0;
	reload();
	for (unsigned i = 0; i < ENTRIES; i++)
		GUEST_ASSERT_EQ(witness[i], i * 0x0101010101010101UL);
	ucall_sync(1, first, second);
	return 0;
}}
"""
