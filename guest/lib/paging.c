/*
 * Page tables by hand.
 *
 * 1. CR3 leads to the top table; tables are found at their physical address,
 *    because memory is mapped one to one.
 * 2. Under SEV every entry carries the C-bit, which is no part of the address:
 *    it is masked out wherever an entry becomes an address.
 * 3. A conversion flushes the page from the cache before the C-bit changes (the
 *    same memory has different cache lines with and without it, AMD APM volume 2,
 *    15.34.9 "Memory Consistency"), changes the entry, drops the translation, and
 *    only then tells the host.
 */
#include "hypercall.h"
#include "paging.h"

#define ADDRESS_BITS	0x000ffffffffff000UL
#define CACHE_LINE	64

static uint64_t c_mask;

uint64_t pte_gpa(uint64_t pte)
{
	return pte & ADDRESS_BITS & ~c_mask;
}

void paging_start(const struct boot_info *boot)
{
	c_mask = boot->c_mask;
	CHECK(pte_gpa(read_cr3()) == boot->pml4,
	      "CR3 is 0x%lx, boot info says page tables at 0x%lx", read_cr3(), boot->pml4);
}

uint64_t *get_pte(uint64_t address)
{
	uint64_t *table = (uint64_t *)pte_gpa(read_cr3());

	for (int level = 4;; level--) {
		uint64_t *entry = table + ((address >> (12 + 9 * (level - 1))) & 511);

		CHECK(*entry & PTE_PRESENT, "level %d entry 0x%lx of 0x%lx is not present",
		      level, *entry, address);
		if (level == 1)
			return entry;
		CHECK(!(*entry & PTE_LARGE), "0x%lx is mapped by a large page at level %d, expected 4 KiB",
		      address, level);
		table = (uint64_t *)pte_gpa(*entry);
	}
}

bool find_gpa(uint64_t address, uint64_t *gpa, bool *encrypted)
{
	uint64_t *table = (uint64_t *)pte_gpa(read_cr3());

	for (unsigned shift = 39;; shift -= 9) {
		uint64_t entry = table[address >> shift & 511], inside = (1UL << shift) - 1;

		if (!(entry & PTE_PRESENT))
			return false;
		if (shift == 12 || (shift < 39 && entry & PTE_LARGE)) {
			*gpa = (pte_gpa(entry) & ~inside) | (address & inside);
			*encrypted = entry & c_mask;
			return true;
		}
		table = (uint64_t *)pte_gpa(entry);
	}
}

static void invalidate(uint64_t address)
{
	asm volatile("invlpg (%0)" : : "r"(address) : "memory");
}

void set_pte(uint64_t address, uint64_t pte)
{
	__atomic_store_n(get_pte(address), pte, __ATOMIC_RELEASE);
	invalidate(address);
}

static void set_c_bit(uint64_t address, uint64_t pages, bool private)
{
	if (!c_mask)
		return;
	for (uint64_t page = address; page < address + pages * PAGE_SIZE; page += PAGE_SIZE) {
		uint64_t pte = *get_pte(page);

		for (uint64_t line = page; line < page + PAGE_SIZE; line += CACHE_LINE)
			asm volatile("clflush (%0)" : : "r"(line) : "memory");
		asm volatile("mfence" : : : "memory");
		set_pte(page, private ? pte | c_mask : pte & ~c_mask);
	}
}

static void convert(uint64_t address, uint64_t pages, bool private)
{
	int64_t result;

	set_c_bit(address, pages, private);
	result = map_gpa_range(address, pages,
			       private ? KVM_MAP_GPA_RANGE_ENCRYPTED : KVM_MAP_GPA_RANGE_DECRYPTED);
	CHECK(result == 0, "MAP_GPA_RANGE(0x%lx, %lu pages, %s) returned %ld, expected 0",
	      address, pages, private ? "encrypted" : "decrypted", result);
}

void make_private(uint64_t address, uint64_t pages)
{
	convert(address, pages, true);
}

void make_shared(uint64_t address, uint64_t pages)
{
	convert(address, pages, false);
}
