"""SEV-ES guests that lie to the hypervisor: in every field of the GHCB, in the GHCB MSR, and about where the GHCB is.

What a guest does not mark as valid is none of the hypervisor's business. Each request therefore carries UNTOLD wherever it tells
nothing, in the page's unmarked fields and in the processor's registers; the test looks for it in what the host gets to see.
"""

from __future__ import annotations

from vmm.selftests.hostile.guests import DRAW

UNTOLD = 0x5EC7E75EC7E70BAD
TEXT_COMMON = rf"""
#include "ghcb.h"
#include "ucall.h"
{DRAW}
#define UNTOLD		{UNTOLD:#x}UL
#define AT(field)	offsetof(struct ghcb, field)

static inline void write_msr(uint64_t value)
{{
	asm volatile("wrmsr" : : "c"(MSR_GHCB), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)) : "memory");
}}

static inline uint64_t read_msr(void)
{{
	uint32_t low, high;

	asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(MSR_GHCB));
	return (uint64_t)high << 32 | low;
}}

/* VMGEXIT with something private in every register; they must all be what they were. */
static void vmgexit(void)
{{
	uint64_t bad;

	asm volatile("movq %1, %%rax; movq %%rax, %%rbx; movq %%rax, %%rcx; movq %%rax, %%rdx; movq %%rax, %%rsi; movq %%rax, %%rdi\n\t"
		"movq %%rax, %%r8; movq %%rax, %%r9; movq %%rax, %%r12; movq %%rax, %%r15\n\t"
		".byte 0xf3, 0x0f, 0x01, 0xd9\n\t"
		"xorq %%r10, %%r10\n\t"
		"xorq %1, %%rax; orq %%rax, %%r10; xorq %1, %%rbx; orq %%rbx, %%r10; xorq %1, %%rcx; orq %%rcx, %%r10\n\t"
		"xorq %1, %%rdx; orq %%rdx, %%r10; xorq %1, %%rsi; orq %%rsi, %%r10; xorq %1, %%rdi; orq %%rdi, %%r10\n\t"
		"xorq %1, %%r8; orq %%r8, %%r10; xorq %1, %%r9; orq %%r9, %%r10; xorq %1, %%r12; orq %%r12, %%r10\n\t"
		"xorq %1, %%r15; orq %%r15, %%r10; movq %%r10, %0"
		: "=r"(bad) : "r"(UNTOLD)
		: "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r12", "r15", "memory", "cc");
	CHECK(!bad, "VMGEXIT changed a register");
}}
"""

LIES = (
    TEXT_COMMON
    + r"""
enum { IOIO_PORT = 16 };

static uint8_t private_page[PAGE_SIZE] __attribute__((aligned(4096)));

/* But the termination (MSR_LIES asks for it), and RDPMC and RDTSCP, which KVM answers with an exception. */
static const uint64_t codes[] = {
	0x27, 0x37, 0x40, 0x6e, 0x72, 0x76, 0x7a, 0x7b, 0x7b, 0x7c, 0x7c, 0x80, 0x81, 0x89, 0x8a, 0x8b, 0x400,
	0x80000001, 0x80000001, 0x80000002, 0x80000002, 0x80000003, 0x80000004, 0x80000005, 0x80000010, 0x80000011, 0x80000012, 0x80000013,
	0x8000fffd, 0x8000ffff, 0, 1, 0x7fffffff, 0x100000072, 0xffffffff, ~0UL,
};

static const unsigned fields[] = {
	AT(rax), AT(rcx), AT(rdx), AT(rbx), AT(exit_code), AT(exit_info_1), AT(exit_info_2), AT(scratch), AT(xcr0), AT(xss), AT(cpl) & ~7U,
	0x158, 0x170, 0x1d8, 0x328, 0x330, 0x338, 0x340, 0x378,		/* DR7, RIP, RSP, RBP, RSI, RDI, R8, R15 */
};

static uint64_t lie(uint64_t page)
{
	const uint64_t values[] = {
		0, 1, 2, 8, 9, 0xc, 0x80, 0x7ff, PAGE_SIZE, 0x7fffffff, 0x80000000, 0xffffffff, 1UL << 52, 1UL << 63, ~0UL, ~7UL,
		page, page - 1, page + 0x7ff, page + 0x800, page + 0x800 + GHCB_BUFFER_SIZE - 1, page + 0x800 + GHCB_BUFFER_SIZE,
		(uint64_t)private_page, 0xd0000000, 0xc0000000, 0xc0000080, 0xc0010130, 0x40000abc, 12, 0x1b,
	};

	return PICK(values);
}

static uint64_t port_info(void)
{
	static const uint64_t ports[] = { 0x80, 0x60, 0x1234, 0xffff };

	return PICK(ports) << IOIO_PORT | (draw() & 0xffff);
}

static void ask(volatile struct ghcb *page, uint64_t code, unsigned omitted)
{
	volatile uint64_t *words = (volatile uint64_t *)page;
	uint64_t at = (uint64_t)page;

	for (unsigned i = 0; i < AT(valid) / 8; i++)
		words[i] = UNTOLD;
	for (unsigned i = 0; i < sizeof(page->valid); i++)
		page->valid[i] = 0;
	for (unsigned i = 0; i < COUNT(fields); i++) {
		if (i == omitted || (fields[i] != AT(exit_code) && fields[i] != AT(exit_info_1) && fields[i] != AT(exit_info_2) && draw() % 4 == 0))
			continue;
		words[fields[i] / 8] = lie(at);
		ghcb_mark(page, fields[i]);
	}
	/* KVM reads these three whether they are marked or not. */
	page->exit_code = code;
	page->exit_info_1 = code == 0x7b ? port_info() : lie(at);
	page->exit_info_2 = lie(at);
	if (draw() % 2) {	/* often enough a place and a length that are good */
		page->scratch = at + 0x800 + draw() % GHCB_BUFFER_SIZE;
		if (page->scratch != UNTOLD)
			ghcb_mark(page, AT(scratch));
		page->exit_info_2 = 1 + draw() % 16;
	}
	if (code == VC_VMMCALL && draw() % 2) {	/* a conversion that reaches the VMM */
		ghcb_set(page, rax, 12);
		ghcb_set(page, rbx, (uint64_t)private_page);
		ghcb_set(page, rcx, 1);
		ghcb_set(page, cpl, 0);
	}
	page->version = draw() % 4;
	page->usage = draw() % 16 ? 0 : draw();
	vmgexit();
}

enum { MALFORMED = 2, INVALID_USAGE = 2, INVALID_SCRATCH = 3, MISSING_INPUT = 4, INVALID_INPUT = 5, INVALID_EVENT = 6 };

/* What is wrong with a request is said before anyone looks at what it asks for, and nothing of it stays valid. */
static void judge(volatile struct ghcb *page, uint64_t code, unsigned omitted)
{
	uint64_t response = page->exit_info_1, why = page->exit_info_2;
	bool incomplete = omitted < COUNT(fields) && fields[omitted] >= AT(exit_code) && fields[omitted] <= AT(exit_info_2);

	CHECK(!(page->valid[0x1d8 / 64] >> (0x1d8 / 8 & 7) & 1), "RSP is still marked as valid after request 0x%lx", code);
	if (page->usage)
		CHECK(response == MALFORMED && why == INVALID_USAGE, "request 0x%lx in no GHCB: %lu, %lu", code, response, why);
	else if (incomplete)
		CHECK(response == MALFORMED && (why == MISSING_INPUT || why == INVALID_EVENT), "request 0x%lx without a field: %lu, %lu",
		      code, response, why);
}

static volatile struct ghcb *request(uint64_t code, uint64_t info_1, uint64_t info_2)
{
	volatile struct ghcb *page = ghcb_open();

	ghcb_set(page, exit_code, code);
	ghcb_set(page, exit_info_1, info_1);
	ghcb_set(page, exit_info_2, info_2);
	return page;
}

/* Lies with one right answer. */
static void exact(const struct boot_info *boot)
{
	volatile struct ghcb *page = ghcb_page();
	const uint64_t at = (uint64_t)page, places[] = {
		at, at + 0x7f8, at + 0x7fc, at + 0x800 + GHCB_BUFFER_SIZE - 4, at + PAGE_SIZE - 8, (uint64_t)private_page, boot->test_area, 0,
		0xd0000000, 0xc0000000, ~7UL,
	};

	for (unsigned i = 0; i < COUNT(places); i++) {
		request(GHCB_MMIO_READ, 0xd0000000, 8);
		ghcb_set(page, scratch, places[i]);
		vmgexit();
		CHECK(page->exit_info_1 == MALFORMED && page->exit_info_2 == INVALID_SCRATCH, "a buffer at 0x%lx: %lu, %lu",
		      places[i], page->exit_info_1, page->exit_info_2);
	}
	request(GHCB_MMIO_READ, 0xd0000000, 9);
	ghcb_set(page, scratch, (uint64_t)page->buffer);
	vmgexit();
	CHECK(page->exit_info_1 == MALFORMED && page->exit_info_2 == INVALID_INPUT, "9 bytes at once: %lu, %lu", page->exit_info_1,
	      page->exit_info_2);
	request(VC_VMMCALL, 0, 0);
	ghcb_set(page, rax, 12);
	ghcb_set(page, rbx, boot->test_area);
	ghcb_set(page, rcx, 1);
	ghcb_set(page, cpl, 3);
	vmgexit();
	CHECK(page->exit_info_1 == 0 && page->rax == -1UL, "a hypercall of user code: %lu, 0x%lx", page->exit_info_1, page->rax);
}

static bool faults(volatile struct ghcb *page, uint64_t code, unsigned vector)
{
	struct caught caught;

	request(code, 0, 0);
	ghcb_set(page, rcx, 0);
	return EXPECT_EXCEPTION(vector, &caught, ".byte 0xf3, 0x0f, 0x01, 0xd9");
}

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	volatile struct ghcb *page = ghcb_page();
	uint64_t rounds = 0, answers[4] = { 0 }, echo;

	(void)vcpu;
	argument_value(boot, "rounds", &rounds);
	for (unsigned i = 0; i < PAGE_SIZE; i++)
		private_page[i] = i * 7;
	for (uint64_t round = 0; round < rounds; round++) {
		for (unsigned i = 0; i < COUNT(codes); i++) {
			unsigned omitted = round % (COUNT(fields) + 4);
			uint64_t response;

			ask(page, codes[i], omitted);
			judge(page, codes[i], omitted);
			response = page->exit_info_1;
			answers[response < 3 ? response : 3]++;
			ghcb_open();
		}
	}
	exact(boot);
	CHECK(faults(page, VC_RDPMC, 13), "RDPMC, of which there is no counter, is no #GP");
	CHECK(faults(page, VC_RDTSCP, 6), "RDTSCP, which KVM does not intercept, is no #UD");
	/* The host is as useful as before to an honest question. */
	out32(PORT_ECHO, 0x12345678);
	echo = in32(PORT_ECHO);
	CHECK(echo == 0x12345679, "the echo port said 0x%lx", echo);
	for (unsigned i = 0; i < PAGE_SIZE; i++)
		CHECK(private_page[i] == (uint8_t)(i * 7), "the host wrote to private memory, at byte %u", i);
	ucall_sync(1, answers[0], answers[1], answers[2], answers[3]);
	return 0;
}
"""
)

MSR_LIES = (
    TEXT_COMMON
    + r"""
static uint8_t victim[PAGE_SIZE] __attribute__((aligned(4096)));
static volatile uint64_t witness[PAGE_SIZE / 8] __attribute__((aligned(4096)));

/* Every request of the MSR protocol, with any value beside it; then pages that are none. */
unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	const uint64_t places[] = {
		0xc0000000, boot->mmio, boot->memory_size, 1UL << 40, 1UL << 51, 1UL << 52, ~0xfffUL, (uint64_t)victim,
	};
	uint64_t before = read_msr(), changed = 0;

	(void)vcpu;
	for (unsigned i = 0; i < COUNT(witness); i++)
		witness[i] = i;
	for (unsigned request = 1; request < 0x1000; request++) {
		uint64_t msr = (draw() & ~0xfffUL) | request;

		write_msr(msr);
		vmgexit();
		changed += read_msr() != msr;
	}
	for (unsigned round = 0; round < 4; round++) {
		for (unsigned i = 0; i < COUNT(places); i++) {
			write_msr(places[i]);
			vmgexit();
		}
	}
	write_msr(before);
	for (unsigned i = 0; i < COUNT(witness); i++)
		GUEST_ASSERT_EQ(witness[i], i);
	ucall_sync(1, changed);
	return 0;
}
"""
)

MOVED = (
    TEXT_COMMON
    + r"""
#define SLOT	0xb0000000UL

/* A GHCB in a memslot of its own, which the host takes away while it answers. */
unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	volatile struct ghcb *page = (volatile struct ghcb *)SLOT;
	uint64_t own = read_msr(), rounds = 0, lost = 0;

	(void)vcpu;
	argument_value(boot, "rounds", &rounds);
	for (uint64_t round = 0; round < rounds; round++) {
		for (unsigned i = 0; i < sizeof(page->valid); i++)
			page->valid[i] = 0;
		page->version = 2;
		page->usage = 0;
		ghcb_set(page, rax, 0x40 + round);
		ghcb_set(page, exit_code, VC_IOIO);
		ghcb_set(page, exit_info_1, 0x1234UL << 16 | 1UL << 4 | (round & 1));
		ghcb_set(page, exit_info_2, 0);
		write_msr(SLOT);
		vmgexit();
		write_msr(own);
		lost += ucall_sync(1, round) != 0;
	}
	ucall_sync(2, lost);
	return 0;
}
"""
)
