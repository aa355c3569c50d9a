"""The guest of the RFC suite: one program for all cases, which its argument `case=N` tells apart.

Two flavours, as the two selftests had them: on SEV the ucall is a HLT with the shared page (no port may be touched by a guest that has
no #VC handler yet, and the host cannot read registers), on plain VMs a port, and the size of the test memory comes from an MMIO read.

SEV does not tell KVM the C-bit of an access, so the guest says what its accesses are, by the hypercall bits MARK and CLR. `unmark=range` is
the later form (CLR of the range; accesses are private until then), without it the first (MARK of nothing; accesses are shared anyway).

The guest finds its page tables where the host mapped them for it, told by a page of their addresses: see `rig.expose_tables`.
"""

from __future__ import annotations

TEST_GPA = 0xB0000000
"""Where the test memory is, for the guest too."""

SIZE_GPA = 0xA0000000
"""MMIO: a read gives the size of the test memory in bytes (plain VMs)."""

TABLES_PAGE, RANGES_PAGE = 0xE0000, 0xE1000
"""Pages of the guest that nothing else uses: what its page tables are, and what it has to share first (UPM mode)."""

PAT1, PAT2, PAT3, PAT4 = 0x6666666666666666, 0x9999999999999999, 0x3333333333333333, 0xAAAAAAAAAAAAAAAA

HEAD = r"""
#include "hypercall.h"
#include "ucall.h"

#define MARK			(1UL << 8)	/* KVM_MARK_GPA_RANGE_ENC_ACCESS */
#define CLR			(1UL << 9)	/* KVM_CLR_GPA_RANGE_ENC_ACCESS */
#define ADDRESS_BITS		0x000ffffffffff000UL
#define PRESENT			1UL
#define LARGE			(1UL << 7)

/* What the host tells about the tables: entries of tables hold the C-bit, and so do these addresses. */
struct table_info {
	uint64_t count, gva, page_size, address[];
};

/* UPM mode: what must be shared (or private) before anything else, up to the first without pages. */
struct startup_range {
	uint64_t gpa, pages, private;
};

static const struct boot_info *boot;
static uint64_t pages, size;
static bool marks_by_range;
static volatile uint64_t *const memory = (volatile uint64_t *)TEST_GPA;

/* ---- page tables, where the host shows them */

static uint64_t *exposed_table(uint64_t address)
{
	const volatile struct table_info *info = (const volatile struct table_info *)TABLES_PAGE;

	for (uint64_t i = 0; i < info->count; i++)
		if (info->address[i] == address)
			return (uint64_t *)(info->gva + i * info->page_size);
	return NULL;
}

/* The 4 KiB leaf entry of an address; NULL where there is none, or only a larger page. */
static uint64_t *exposed_entry(uint64_t address)
{
	uint64_t cr3;
	uint64_t *entry = NULL, *table;

	asm volatile("movq %%cr3, %0" : "=r"(cr3));
	table = exposed_table((cr3 & ADDRESS_BITS) | boot->c_mask);
	for (int shift = 39; shift >= 12; shift -= 9) {
		if (!table)
			return NULL;
		entry = table + (address >> shift & 511);
		if (!(*entry & PRESENT) || (shift > 12 && *entry & LARGE))
			return NULL;
		table = exposed_table(*entry & ADDRESS_BITS);
	}
	return entry;
}

static void set_c_bits(bool private)
{
	if (!boot->c_mask)
		return;
	for (uint64_t at = TEST_GPA; at < TEST_GPA + size; at += PAGE_SIZE) {
		uint64_t *entry = exposed_entry(at);

		GUEST_ASSERT(entry);
		__atomic_store_n(entry, private ? *entry | boot->c_mask : *entry & ~boot->c_mask, __ATOMIC_RELEASE);
		asm volatile("invlpg (%0)" : : "r"(at) : "memory");
	}
}

/* ---- what the cases are made of */

#define SETC()			set_c_bits(true)
#define CLRC()			set_c_bits(false)
#define HYPERCALL(gpa, pages, bits)	GUEST_ASSERT_EQ(map_gpa_range(gpa, pages, bits), 0)
#define MARK_PRIVATE()		HYPERCALL(TEST_GPA, pages, MARK)
#define UNMARK()								\
	do {									\
		if (marks_by_range)						\
			HYPERCALL(TEST_GPA, pages, CLR);			\
		else								\
			HYPERCALL(0, 0, MARK);					\
	} while (0)
/* Only where an access is private unless the guest says otherwise. */
#define UNMARK_FIRST()								\
	do {									\
		if (marks_by_range)						\
			UNMARK();						\
	} while (0)
#define MAP_PRIVATE()		HYPERCALL(TEST_GPA, pages, KVM_MAP_GPA_RANGE_ENCRYPTED | KVM_MAP_GPA_RANGE_PAGE_SZ_4K)
#define MAP_SHARED()		HYPERCALL(TEST_GPA, pages, KVM_MAP_GPA_RANGE_DECRYPTED | KVM_MAP_GPA_RANGE_PAGE_SZ_4K)
#define SYNC(stage)		((void)ucall_sync(stage))

static void write(uint64_t pattern)
{
	for (uint64_t i = 0; i < size / 8; i++)
		memory[i] = pattern;
}

/* Does any page begin with the pattern? */
static bool found(uint64_t pattern)
{
	for (uint64_t at = 0; at < size; at += PAGE_SIZE)
		if (memory[at / 8] == pattern)
			return true;
	return false;
}

/* The first word that is not the pattern, or the pattern. */
static uint64_t other_than(uint64_t pattern)
{
	for (uint64_t i = 0; i < size / 8; i++)
		if (memory[i] != pattern)
			return memory[i];
	return pattern;
}

#define READS(pattern)		GUEST_ASSERT_EQ(other_than(pattern), pattern)

/* Am I what I think I am? */
static void check_sev(void)
{
	uint32_t eax = 0x8000001f, ebx, ecx = 0, edx, low, high;

	if (boot->vm_type < VM_SEV)
		return;
	asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
	asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(0xc0010131));
	GUEST_ASSERT(eax & 1 << 1);
	GUEST_ASSERT(low & 1);
	if (boot->vm_type == VM_SEV_ES) {
		GUEST_ASSERT(eax & 1 << 3);
		GUEST_ASSERT(low & 2);
	}
}
"""

TAIL = r"""
static void share_first(void)
{
	const struct startup_range *range = (const struct startup_range *)RANGES_PAGE;

	for (; range->pages; range++)
		HYPERCALL(range->gpa, range->pages, range->private ? KVM_MAP_GPA_RANGE_ENCRYPTED : KVM_MAP_GPA_RANGE_DECRYPTED);
}

unsigned guest_main(const struct boot_info *info, unsigned vcpu)
{
	uint64_t number;

	(void)vcpu;
	boot = info;
	if (argument(boot, "upm"))
		share_first();
	marks_by_range = argument(boot, "unmark=range");
	GUEST_ASSERT(argument_value(boot, "case", &number));
	if (!argument_value(boot, "size", &size))
		size = *(volatile uint64_t *)SIZE_GPA;
	pages = size / PAGE_SIZE;
	GUEST_ASSERT(number < sizeof(cases) / sizeof(cases[0]));
	cases[number]();
	ucall_done();
	return 0;
}
"""


def program(bodies: list[tuple[str, int, str]], by_hlt: bool) -> str:
    """The C text with these bodies as cases 0, 1, ...: each with the line and the file where it stands, for the guest's complaints."""
    defines = {"TEST_GPA": TEST_GPA, "SIZE_GPA": SIZE_GPA, "TABLES_PAGE": TABLES_PAGE, "RANGES_PAGE": RANGES_PAGE,
               "PAT1": PAT1, "PAT2": PAT2, "PAT3": PAT3, "PAT4": PAT4}  # fmt: skip
    text = "#define UCALL_HLT\n" * by_hlt + "".join(f"#define {name} {value:#x}UL\n" for name, value in defines.items()) + HEAD
    for number, (body, line, file) in enumerate(bodies):
        text += f'static void case_{number}(void)\n{{\n#line {line} "{file}"\n{body}}}\n'
    names = ", ".join(f"case_{number}" for number in range(len(bodies)))
    return f"{text}static void (*const cases[])(void) = {{ {names} }};\n{TAIL}"
