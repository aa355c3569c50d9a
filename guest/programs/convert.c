/*
 * convert: explicit conversions do what they promise, for every size.
 *
 * 1. Calls of MAP_GPA_RANGE that make no sense return -22 and change nothing.
 * 2. Page-size bits that do not match the range are allowed: they are a hint.
 * 3. For 1 page, 256 pages and 2 MiB: fill while shared, convert to private, look,
 *    fill, convert to private again (which must change nothing), convert to
 *    shared, look, fill, and once more there and back.
 *
 * What is seen after a conversion depends on the VM type:
 *   plain         the VMM only keeps the map: contents stay
 *   sw-protected  private and shared contents are two memories: the private one
 *                 starts zeroed, the shared one reappears; a private page that
 *                 comes back holds its old contents or zeroes (KVM leaves it to
 *                 the VMM whether to punch a hole), never the shared ones
 *   sev           one memory, encrypted or not: what was written in one way
 *                 cannot be read in the other
 */
#include "hypercall.h"
#include "paging.h"
#include "patterns.h"

static void expect_result(const char *what, uint64_t gpa, uint64_t pages, uint64_t attributes, int64_t expected)
{
	int64_t result = map_gpa_range(gpa, pages, attributes);

	CHECK(result == expected, "MAP_GPA_RANGE with %s returned %ld, expected %ld (gpa 0x%lx, %lu pages)",
	      what, result, expected, gpa, pages);
}

static void bad_calls(uint64_t area)
{
	expect_result("an unaligned address", area + 8, 1, KVM_MAP_GPA_RANGE_ENCRYPTED, -KVM_EINVAL);
	expect_result("no pages", area, 0, KVM_MAP_GPA_RANGE_ENCRYPTED, -KVM_EINVAL);
	expect_result("a wrapping range", area, ~0UL, KVM_MAP_GPA_RANGE_ENCRYPTED, -KVM_EINVAL);
	print("convert: bad calls refused\n");

	/* Both leave the page shared, as it is, so that no C-bit must follow. */
	expect_result("2 MiB for one page", area, 1, KVM_MAP_GPA_RANGE_PAGE_SZ_2M, 0);
	expect_result("1 GiB for one page", area, 1, KVM_MAP_GPA_RANGE_PAGE_SZ_1G, 0);
	print("convert: page-size bits are a hint\n");
}

/* A private page that was private before: zeroes or what it held, word by word. */
static void verify_returned(uint64_t at, uint64_t size, uint64_t offset)
{
	for (uint64_t i = 0; i < size; i += 8) {
		uint64_t seen = *(volatile uint64_t *)(at + i), old = pattern_word(PATTERN_PRIVATE, offset + i);

		CHECK(seen == 0 || seen == old,
		      "private again: expected 0x0 or 0x%lx, seen 0x%lx at 0x%lx", old, seen, at + i);
	}
}

static void there_and_back(uint64_t type, uint64_t area, uint64_t offset, uint64_t pages)
{
	uint64_t at = area + offset, size = pages * PAGE_SIZE;

	fill(at, size, PATTERN_SHARED, offset);
	make_private(at, pages);
	if (type == VM_PLAIN)
		verify("first conversion to private", at, size, PATTERN_SHARED, offset);
	else if (type == VM_SW_PROTECTED)
		verify_zero("first conversion to private", at, size);
	else
		verify_hidden("first conversion to private", at, size, PATTERN_SHARED, offset);

	fill(at, size, PATTERN_PRIVATE, offset);
	verify("private", at, size, PATTERN_PRIVATE, offset);
	make_private(at, pages);
	verify("private, converted to private again", at, size, PATTERN_PRIVATE, offset);

	make_shared(at, pages);
	if (type == VM_PLAIN)
		verify("back to shared", at, size, PATTERN_PRIVATE, offset);
	else if (type == VM_SW_PROTECTED)
		verify("back to shared", at, size, PATTERN_SHARED, offset);
	else
		verify_hidden("back to shared", at, size, PATTERN_PRIVATE, offset);

	fill(at, size, PATTERN_CONVERTED, offset);
	verify("shared", at, size, PATTERN_CONVERTED, offset);
	make_private(at, pages);
	if (type == VM_PLAIN)
		verify("private again", at, size, PATTERN_CONVERTED, offset);
	else if (type == VM_SW_PROTECTED)
		verify_returned(at, size, offset);
	else
		verify_hidden("private again", at, size, PATTERN_CONVERTED, offset);
	make_shared(at, pages);
	print("convert: %lu pages at 0x%lx ok\n", pages, at);
}

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	uint64_t area = boot->test_area;

	(void)vcpu;
	CHECK(boot->features & FEATURE_MAP_GPA_RANGE, "the VMM offers no MAP_GPA_RANGE hypercall");
	paging_start(boot);
	bad_calls(area);
	there_and_back(boot->vm_type, area, 0, 1);
	there_and_back(boot->vm_type, area, 256 * PAGE_SIZE, 256);
	there_and_back(boot->vm_type, area, PAGE_2M, PAGE_2M / PAGE_SIZE);
	print("convert: done\n");
	return EXIT_PASS;
}
