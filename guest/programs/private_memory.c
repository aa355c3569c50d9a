/*
 * private-memory: what is written into private memory stays there.
 *
 * 1. Find the page tables by CR3 and walk them to the test area.
 * 2. Fill 16 pages of it, still shared, with pattern S.            stage 1
 * 3. Convert them to private (C-bit in the own tables, invlpg, MAP_GPA_RANGE),
 *    write the private pattern P, verify every byte.               stage 2
 *    Under SEV map one of them a second time without the C-bit: P must not
 *    be seen through that alias.
 * 4. Convert every second page back to shared: P must not be seen in it, the
 *    others keep P. Write pattern Q, verify.                       stage 3
 * 5. Convert these to private again, write P, verify all 16 pages. stage 4
 *    P is left in place: the host may search its memory for it.
 *
 * The argument `leak` copies the first page of P into the shared page after the
 * 16, before stage 4: the control for a test that searches.
 */
#include "paging.h"
#include "patterns.h"

#define PAGES	16
#define SIZE	(PAGES * PAGE_SIZE)

enum { STAGE_SHARED = 1, STAGE_PRIVATE, STAGE_HALF_SHARED, STAGE_ALL_PRIVATE };

static void find_tables(const struct boot_info *boot)
{
	uint64_t last = boot->test_area + SIZE - PAGE_SIZE;

	paging_start(boot);
	for (uint64_t at = boot->test_area; at <= last; at += PAGE_SIZE) {
		uint64_t pte = *get_pte(at);

		CHECK(pte_gpa(pte) == at, "0x%lx is mapped to 0x%lx, expected one to one", at, pte_gpa(pte));
		CHECK(!(pte & boot->c_mask), "0x%lx starts with the C-bit, entry 0x%lx", at, pte);
	}
}

static void look_through_alias(const struct boot_info *boot)
{
	uint64_t spare = boot->test_area + boot->test_size - PAGE_SIZE;
	uint64_t own = *get_pte(spare);
	uint64_t target = *get_pte(boot->test_area);

	if (!boot->c_mask)
		return;
	CHECK(target & boot->c_mask, "0x%lx was converted but its entry 0x%lx has no C-bit",
	      boot->test_area, target);
	set_pte(spare, target & ~boot->c_mask);
	verify_hidden("private page through a shared alias", spare, PAGE_SIZE, PATTERN_PRIVATE, 0);
	set_pte(spare, own);
	print("private-memory: alias without C-bit shows nothing\n");
}

static void half_and_back(uint64_t area)
{
	for (uint64_t at = PAGE_SIZE; at < SIZE; at += 2 * PAGE_SIZE) {
		make_shared(area + at, 1);
		verify_hidden("converted to shared", area + at, PAGE_SIZE, PATTERN_PRIVATE, at);
		fill(area + at, PAGE_SIZE, PATTERN_CONVERTED, at);
	}
	for (uint64_t at = 0; at < SIZE; at += PAGE_SIZE)
		verify("half shared", area + at, PAGE_SIZE,
		       at & PAGE_SIZE ? PATTERN_CONVERTED : PATTERN_PRIVATE, at);
}

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	uint64_t area = boot->test_area;

	(void)vcpu;
	CHECK(boot->features & FEATURE_MAP_GPA_RANGE, "the VMM offers no MAP_GPA_RANGE hypercall");
	find_tables(boot);

	fill(area, SIZE, PATTERN_SHARED, 0);
	verify("shared", area, SIZE, PATTERN_SHARED, 0);
	announce(boot, STAGE_SHARED);

	make_private(area, PAGES);
	fill(area, SIZE, PATTERN_PRIVATE, 0);
	verify("private", area, SIZE, PATTERN_PRIVATE, 0);
	announce(boot, STAGE_PRIVATE);
	look_through_alias(boot);

	half_and_back(area);
	announce(boot, STAGE_HALF_SHARED);

	for (uint64_t at = PAGE_SIZE; at < SIZE; at += 2 * PAGE_SIZE) {
		make_private(area + at, 1);
		fill(area + at, PAGE_SIZE, PATTERN_PRIVATE, at);
	}
	verify("private again", area, SIZE, PATTERN_PRIVATE, 0);
	if (argument(boot, "leak"))
		fill(area + SIZE, PAGE_SIZE, PATTERN_PRIVATE, 0);
	announce(boot, STAGE_ALL_PRIVATE);

	print("private-memory: all bytes verified\n");
	return EXIT_PASS;
}
