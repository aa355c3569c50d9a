/*
 * exits: one of each exit a host can deliver, with the answers checked.
 *
 * 1. Port I/O of 1, 2 and 4 bytes at the echo port, which answers value + 1.
 * 2. String I/O: rep outsb to the console, rep insb from the echo port, and more
 *    than a page to it. Not in a SEV guest, whose host cannot read or write the
 *    encrypted buffer; in an SEV-ES guest the #VC handler copies.
 * 3. MMIO of 1, 2, 4 and 8 bytes, and add, which is a read and a write.
 * 4. RDMSR and WRMSR of an MSR that the VMM serves.
 * 5. MAP_GPA_RANGE, called well and badly.
 * 6. CPUID, which the VMM chose.
 * 7. What only an SEV-ES guest can ask: the MSR protocol says of CPUID what the
 *    GHCB says, features of the host, the AP jump table.
 * 8. Exceptions, which stay inside the guest: vector, error code, RIP and CR2.
 *
 * One line per kind; what the boot info does not offer is skipped in words.
 */
#include "ghcb.h"
#include "hypercall.h"
#include "paging.h"

#define LETTERS	8
#define MANY	5000

static bool offered(const struct boot_info *boot, uint64_t feature, const char *what)
{
	if (!(boot->features & feature))
		print("exits: %s skipped (not offered)\n", what);
	return boot->features & feature;
}

static void port_io(void)
{
	uint8_t b;
	uint16_t w;
	uint32_t l;

	out8(PORT_ECHO, 0x41);
	b = in8(PORT_ECHO);
	CHECK(b == 0x42, "IN of 1 byte: expected 0x42, seen 0x%x", b);
	out16(PORT_ECHO, 0xfffe);
	w = in16(PORT_ECHO);
	CHECK(w == 0xffff, "IN of 2 bytes: expected 0xffff, seen 0x%x", w);
	out32(PORT_ECHO, 0xffffffff);
	l = in32(PORT_ECHO);
	CHECK(l == 0, "IN of 4 bytes: expected 0x0 (wrapped), seen 0x%x", l);
	out32(PORT_ECHO, 0x12345678);
	l = in32(PORT_ECHO);
	CHECK(l == 0x12345679, "IN of 4 bytes: expected 0x12345679, seen 0x%x", l);
	print("exits: io ok\n");
}

static void string_io(const struct boot_info *boot)
{
	static const char text[] = "exits: rep outsb speaks\n";
	static uint8_t letters[LETTERS + 1] __attribute__((aligned(16))), many[MANY];
	const void *from = text;
	void *to = letters;
	uint64_t count = sizeof(text) - 1;

	if (boot->vm_type == VM_SEV) {
		print("exits: string io skipped (memory is encrypted)\n");
		return;
	}
	asm volatile("rep outsb" : "+S"(from), "+c"(count) : "d"(PORT_CONSOLE) : "memory");
	CHECK(count == 0, "rep outsb stopped with %lu bytes left", count);
	count = LETTERS;
	asm volatile("rep insb" : "+D"(to), "+c"(count) : "d"(PORT_ECHO) : "memory");
	CHECK(count == 0 && to == letters + LETTERS, "rep insb stopped with %lu bytes left", count);
	for (unsigned i = 0; i < LETTERS; i++)
		CHECK(letters[i] == 'A' + i, "rep insb byte %u: expected 0x%x, seen 0x%x", i, 'A' + i, letters[i]);
	CHECK(letters[LETTERS] == 0, "rep insb wrote a byte too many");

	for (unsigned i = 0; i < MANY; i++)
		many[i] = i * 7;
	from = many;
	count = MANY;
	asm volatile("rep outsb" : "+S"(from), "+c"(count) : "d"(PORT_ECHO) : "memory");
	CHECK(count == 0 && from == many + MANY, "rep outsb of %u bytes stopped with %lu bytes left", MANY, count);
	letters[0] = in8(PORT_ECHO);
	CHECK(letters[0] == (uint8_t)(many[MANY - 1] + 1), "rep outsb of %u bytes: the last one arrived as 0x%x, not 0x%x",
	      MANY, (uint8_t)(letters[0] - 1), many[MANY - 1]);
	print("exits: string io ok\n");
}

/* One register per width, so that nothing depends on how a device merges widths. */
#define MMIO_TEST(type, suffix, where, value)						\
	do {										\
		type seen;								\
		asm volatile("mov" suffix " %1, (%0)"					\
			     : : "r"(where), "r"((type)(value)) : "memory");		\
		asm volatile("mov" suffix " (%1), %0" : "=r"(seen) : "r"(where) : "memory"); \
		CHECK(seen == (type)(value), "MMIO of %u bytes at 0x%lx: expected 0x%lx, seen 0x%lx",	\
		      (unsigned)sizeof(type), where, (uint64_t)(type)(value), (uint64_t)seen);	\
	} while (0)

static void mmio(const struct boot_info *boot)
{
	uint64_t base = boot->mmio, seen;

	MMIO_TEST(uint8_t, "b", base, 0xa5);
	MMIO_TEST(uint16_t, "w", base + 8, 0xbeef);
	MMIO_TEST(uint32_t, "l", base + 16, 0xdeadbeef);
	MMIO_TEST(uint64_t, "q", base + 24, 0x0123456789abcdef);
	asm volatile("addq %1, (%0)" : : "r"(base + 24), "r"(0x11UL) : "memory", "cc");
	asm volatile("movq (%1), %0" : "=r"(seen) : "r"(base + 24) : "memory");
	CHECK(seen == 0x0123456789abce00, "add to MMIO: expected 0x123456789abce00, seen 0x%lx", seen);
	print("exits: mmio ok\n");
}

static void msr(const struct boot_info *boot)
{
	uint64_t value = 0x1122334455667788, seen;
	uint32_t low, high;

	asm volatile("wrmsr" : : "c"((uint32_t)boot->msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)));
	asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"((uint32_t)boot->msr));
	seen = (uint64_t)high << 32 | low;
	CHECK(seen == value + 1, "RDMSR 0x%lx: expected 0x%lx, seen 0x%lx", boot->msr, value + 1, seen);
	print("exits: msr ok\n");
}

static void hypercall(const struct boot_info *boot)
{
	uint64_t gpa = boot->test_area;
	int64_t result = map_gpa_range(gpa, 1, KVM_MAP_GPA_RANGE_ENCRYPTED);

	/* The page is not touched in between, so its C-bit may stay as it is. */
	CHECK(result == 0, "MAP_GPA_RANGE to private returned %ld, expected 0", result);
	result = map_gpa_range(gpa, 1, KVM_MAP_GPA_RANGE_DECRYPTED);
	CHECK(result == 0, "MAP_GPA_RANGE to shared returned %ld, expected 0", result);
	result = map_gpa_range(gpa + 1, 1, KVM_MAP_GPA_RANGE_ENCRYPTED);
	CHECK(result == -KVM_EINVAL, "MAP_GPA_RANGE, unaligned, returned %ld, expected -22", result);
	result = map_gpa_range(gpa, 0, KVM_MAP_GPA_RANGE_ENCRYPTED);
	CHECK(result == -KVM_EINVAL, "MAP_GPA_RANGE of no pages returned %ld, expected -22", result);
	result = map_gpa_range(gpa, ~0UL, KVM_MAP_GPA_RANGE_ENCRYPTED);
	CHECK(result == -KVM_EINVAL, "MAP_GPA_RANGE, wrapping, returned %ld, expected -22", result);
	print("exits: hypercall ok\n");
}

static void cpuid(uint32_t leaf, uint32_t r[4])
{
	asm volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(0));
}

static void identity(void)
{
	uint32_t r[4], vendor[4] = { 0 }, hypervisor[4] = { 0 };

	cpuid(0, r);
	CHECK(r[0] >= 1, "CPUID leaf 0 says that the last leaf is %u", r[0]);
	vendor[0] = r[1], vendor[1] = r[3], vendor[2] = r[2];
	cpuid(1, r);
	if (r[2] >> 31) {	/* a hypervisor is present and describes itself */
		cpuid(0x40000000, r);
		hypervisor[0] = r[1], hypervisor[1] = r[2], hypervisor[2] = r[3];
	}
	print("exits: cpuid ok, vendor %s, hypervisor %s\n", (const char *)vendor,
	      hypervisor[0] ? (const char *)hypervisor : "none");
}

static void ghcb(const struct boot_info *boot)
{
	uint64_t by_page = ghcb_features(), by_msr = ghcb_features_msr();
	uint64_t before = ghcb_jump_table();

	for (uint32_t leaf = 0; leaf < 2; leaf++) {
		uint32_t r[4], early[4];

		cpuid(leaf, r);
		ghcb_cpuid_msr(leaf, early);
		for (unsigned i = 0; i < 4; i++)
			CHECK(r[i] == early[i], "CPUID leaf %u, register %u: 0x%x by the GHCB, 0x%x by the MSR protocol",
			      leaf, i, r[i], early[i]);
	}
	CHECK(by_page == by_msr, "the host's features: 0x%lx by the GHCB, 0x%lx by the MSR protocol", by_page, by_msr);
	ghcb_set_jump_table(boot->shared_page);
	CHECK(ghcb_jump_table() == boot->shared_page, "the AP jump table is at 0x%lx, set was 0x%lx",
	      ghcb_jump_table(), boot->shared_page);
	ghcb_set_jump_table(before);
	print("exits: ghcb ok, version %u, features 0x%lx\n", ghcb_version(), by_page);
}

static void expect(const char *what, bool taken, const struct caught *caught, uint64_t error, uint64_t length)
{
	CHECK(taken, "%s did not come", what);
	CHECK(caught->error == error, "%s error code: expected 0x%lx, seen 0x%lx", what, error, caught->error);
	CHECK(caught->resume - caught->rip == length, "%s at RIP 0x%lx, expected 0x%lx", what,
	      caught->rip, caught->resume - length);
}

static void exceptions(const struct boot_info *boot)
{
	struct caught caught;
	uint64_t page = boot->test_area, pte;
	bool taken;

	taken = EXPECT_EXCEPTION(6, &caught, "ud2");
	expect("#UD", taken, &caught, 0, 2);
	taken = EXPECT_EXCEPTION(0, &caught, "xorl %%ecx, %%ecx; divl %%ecx");
	expect("#DE", taken, &caught, 0, 2);
	taken = EXPECT_EXCEPTION(13, &caught, "movq %[at], %%rax; movb (%%rax), %%al", [at] "r"(1UL << 63));
	expect("#GP", taken, &caught, 0, 2);

	/* The VMM serves one MSR and refuses the next. */
	if (boot->vm_type == VM_SEV_ES && boot->features & FEATURE_MSR_EXITS) {
		taken = EXPECT_EXCEPTION(13, &caught, "movl %[msr], %%ecx; rdmsr", [msr] "r"((uint32_t)boot->msr + 1));
		expect("#GP that the host raises", taken, &caught, 0, 2);
	}
	taken = EXPECT_EXCEPTION(14, &caught, "movl $0x18, %%eax; movb (%%rax), %%al");
	expect("#PF of a read", taken, &caught, 0, 2);
	CHECK(caught.cr2 == 0x18, "#PF of a read: expected CR2 0x18, seen 0x%lx", caught.cr2);
	taken = EXPECT_EXCEPTION(14, &caught, "movl $0x28, %%eax; movb %%al, (%%rax)");
	expect("#PF of a write", taken, &caught, 2, 2);
	CHECK(caught.cr2 == 0x28, "#PF of a write: expected CR2 0x28, seen 0x%lx", caught.cr2);

	pte = *get_pte(page);
	*(volatile uint8_t *)page = 1;
	set_pte(page, pte & ~PTE_WRITE);
	taken = EXPECT_EXCEPTION(14, &caught, "movq %[at], %%rax; movb %%al, (%%rax)", [at] "r"(page));
	expect("#PF of a write to a read-only page", taken, &caught, 3, 2);
	CHECK(caught.cr2 == page, "#PF of a read-only page: expected CR2 0x%lx, seen 0x%lx", page, caught.cr2);
	set_pte(page, pte);
	*(volatile uint8_t *)page = 2;
	print("exits: exceptions ok\n");
}

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	(void)vcpu;
	paging_start(boot);
	port_io();
	string_io(boot);
	if (offered(boot, FEATURE_MMIO, "mmio"))
		mmio(boot);
	if (offered(boot, FEATURE_MSR_EXITS, "msr"))
		msr(boot);
	if (offered(boot, FEATURE_MAP_GPA_RANGE, "hypercall"))
		hypercall(boot);
	identity();
	if (boot->vm_type == VM_SEV_ES)
		ghcb(boot);
	exceptions(boot);
	print("exits: done\n");
	return EXIT_PASS;
}
