/*
 * fault: the first touch of a page that is private but has no backing.
 *
 * The test area carries the PRIVATE attribute, its memslot has no guest_memfd.
 * Each first touch leaves KVM with a memory fault exit, the VMM makes the page
 * shared (an implicit conversion) and lets the instruction run again.
 *
 * 1. Eight single pages: read with 1, 4 and 8 bytes, written with 1, 4 and 8,
 *    and read-modify-written with and without lock.
 * 2. One store across the border of two untouched pages.
 * 3. rep movsb into four untouched pages, from ordinary memory, and from three
 *    untouched pages into three more: the fault arrives in mid-instruction.
 * 4. All that was written is still there, what was not written is zero.
 */
#include "patterns.h"

#define COPY	(3 * PAGE_SIZE)

static unsigned touched;	/* pages that this program touched for the first time */
static uint8_t source[COPY] __attribute__((aligned(8)));

static uint64_t page(const struct boot_info *boot)
{
	return boot->test_area + PAGE_SIZE * touched++;
}

static void copy(uint64_t to, uint64_t from)
{
	uint64_t left = COPY;

	asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(left) : : "memory");
	CHECK(left == 0, "rep movsb stopped with %lu bytes left", left);
}

static void expect_word(const char *what, uint64_t address, uint64_t expected)
{
	uint64_t seen = *(volatile uint64_t *)address;

	CHECK(seen == expected, "%s: expected 0x%lx, seen 0x%lx at 0x%lx", what, expected, seen, address);
}

static void single_pages(const struct boot_info *boot)
{
	uint64_t r1 = page(boot), r4 = page(boot), r8 = page(boot);
	uint64_t w1 = page(boot), w4 = page(boot), w8 = page(boot);
	uint64_t add = page(boot), locked = page(boot);
	uint64_t old = 5;

	CHECK(*(volatile uint8_t *)(r1 + 7) == 0, "first read of a byte at 0x%lx is not zero", r1 + 7);
	CHECK(*(volatile uint32_t *)(r4 + 8) == 0, "first read of 4 bytes at 0x%lx is not zero", r4 + 8);
	expect_word("first read of 8 bytes", r8 + 16, 0);

	*(volatile uint8_t *)w1 = 0x5a;
	*(volatile uint32_t *)w4 = 0x12345678;
	*(volatile uint64_t *)w8 = 0x0123456789abcdef;
	asm volatile("addq %1, %0" : "+m"(*(volatile uint64_t *)add) : "r"(7UL) : "cc");
	asm volatile("lock xaddq %1, %0" : "+m"(*(volatile uint64_t *)locked), "+r"(old) : : "cc");
	CHECK(old == 0, "lock xadd returned 0x%lx, expected 0x0 at 0x%lx", old, locked);

	expect_word("byte written", w1, 0x5a);
	expect_word("4 bytes written", w4, 0x12345678);
	expect_word("8 bytes written", w8, 0x0123456789abcdef);
	expect_word("add", add, 7);
	expect_word("lock xadd", locked, 5);
	verify_zero("rest of a written page", w8 + 8, PAGE_SIZE - 8);
	print("fault: %u single pages ok\n", touched);
}

static void across_pages(const struct boot_info *boot)
{
	uint64_t border, into, from, to;

	page(boot);
	border = page(boot);
	*(volatile uint64_t *)(border - 4) = 0x1122334455667788;
	expect_word("store across two pages", border - 4, 0x1122334455667788);
	print("fault: store across two pages ok\n");

	fill((uint64_t)source, COPY, PATTERN_SHARED, 0);
	into = page(boot) + PAGE_SIZE / 2;
	touched += 3;
	copy(into, (uint64_t)source);
	verify("rep movsb into untouched pages", into, COPY, PATTERN_SHARED, 0);
	verify_zero("before the copy", into - PAGE_SIZE / 2, PAGE_SIZE / 2);

	from = page(boot);
	touched += 2;
	to = page(boot);
	touched += 2;
	copy(to, from);
	verify_zero("rep movsb between untouched pages", to, COPY);
	verify("copied before", into, COPY, PATTERN_SHARED, 0);
	print("fault: rep movsb across pages ok\n");
}

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	(void)vcpu;
	CHECK(boot->features & FEATURE_IMPLICIT_CONVERSION, "the VMM offers no implicit conversions");
	single_pages(boot);
	across_pages(boot);
	print("fault: %u pages touched, nothing lost\n", touched);
	return EXIT_PASS;
}
