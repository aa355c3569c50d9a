"""The hostile guests: C texts for guest/lib, one attack each. A guest checks what it gets back, as far as anything is promised to it."""

from __future__ import annotations

DRAW = r"""
static uint64_t draw_state = 0x9e3779b97f4a7c15UL;

/* xorshift: the same numbers in each run. */
static inline uint64_t draw_from(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static inline uint64_t draw(void)
{
	return draw_from(&draw_state);
}

#define COUNT(array)	(sizeof(array) / sizeof((array)[0]))
#define PICK(array)	((array)[draw() % COUNT(array)])
"""

STORM = rf"""
#include "hypercall.h"
#include "ucall.h"
{DRAW}
static int64_t call(uint64_t number, uint64_t gpa, uint64_t pages, uint64_t attributes)
{{
	int64_t result;

	asm volatile("vmmcall" : "=a"(result) : "a"(number), "b"(gpa), "c"(pages), "d"(attributes) : "memory");
	return result;
}}

/* Nothing below the test area is legal here: it would be this program itself. */
unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{{
	uint64_t area = boot->test_area, end = boot->memory_size, rounds = 0, legal = 0, refused = 0;
	const uint64_t gpas[] = {{
		area, area + PAGE_SIZE, end - PAGE_SIZE, area + 1, area + 0x800, end, end - PAGE_SIZE + 8, boot->mmio, 1UL << 40, 1UL << 51,
		1UL << 52, 1UL << 63, ~0UL, ~0xfffUL,
	}};
	const uint64_t counts[] = {{ 1, 2, 3, 0, 513, 1UL << 39, 1UL << 40, 1UL << 51, 1UL << 52, 1UL << 63, ~0UL, ~0UL >> 12 }};
	const uint64_t attributes[] = {{ 0, 16, 1, 17, 2, 18, 3, 15, 32, 48, 1UL << 31, 1UL << 32, 1UL << 63, ~0UL }};

	(void)vcpu;
	argument_value(boot, "rounds", &rounds);
	for (uint64_t round = 0; round < rounds; round++) {{
		bool tame = round % 4 == 0;
		uint64_t gpa = tame ? area + draw() % 16 * PAGE_SIZE : PICK(gpas), pages = tame ? 1 + draw() % 16 : PICK(counts);
		uint64_t how = tame ? (draw() & 1) << 4 : PICK(attributes);
		bool good = gpa % PAGE_SIZE == 0 && gpa >= area && gpa < end && pages && pages <= (end - gpa) / PAGE_SIZE &&
			!(how & ~0x1fUL) && (how & 15) <= 2;
		int64_t result = call(KVM_HC_MAP_GPA_RANGE, gpa, pages, how);

		if (good)
			CHECK(result == 0, "a legal conversion of 0x%lx, %lu pages, 0x%lx: %ld", gpa, pages, how, result);
		else
			CHECK(result == -KVM_EINVAL, "a conversion of 0x%lx, %lu pages, 0x%lx: %ld", gpa, pages, how, result);
		legal += good;
		refused += !good;
		if (round % 8 == 0)
			CHECK(call(0x100 + (draw() >> 8), gpa, pages, how) == -1000, "an unknown hypercall was answered");
	}}
	ucall_sync(1, legal, refused);
	return 0;
}}
"""

PING_PONG = r"""
#include "paging.h"
#include "ucall.h"

#define PAGES	128UL
#define ROUNDS	3

static void write_page(uint64_t page, uint64_t value)
{
	for (unsigned i = 0; i < PAGE_SIZE / 8; i++)
		((volatile uint64_t *)page)[i] = value + i;
}

/* Every page there and back, again and again; what was private is neither left behind nor shown. */
unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	bool empties = boot->vm_type == VM_SW_PROTECTED;

	(void)vcpu;
	paging_start(boot);
	for (unsigned round = 0; round < ROUNDS; round++) {
		for (uint64_t number = 0; number < PAGES; number++) {
			uint64_t page = boot->test_area + number * PAGE_SIZE, secret = 0x5ec7e70000000000UL + (number << 16);
			volatile uint64_t *words = (uint64_t *)page;

			words[7] = number;
			make_private(page, 1);
			if (empties) {
				for (unsigned i = 0; i < PAGE_SIZE / 8; i++)
					CHECK(words[i] == 0, "private page 0x%lx begins with 0x%lx in round %u", page, words[i], round);
			}
			write_page(page, secret);
			for (unsigned i = 0; i < PAGE_SIZE / 8; i += 61)
				GUEST_ASSERT_EQ(words[i], secret + i);
			if (number % 16 == 0)
				ucall_sync(1, page, secret);
			make_shared(page, 1);
			for (unsigned i = 0; i < PAGE_SIZE / 8; i += 61)
				CHECK(words[i] != secret + i, "shared page 0x%lx still holds what was private", page);
			if (empties)
				GUEST_ASSERT_EQ(words[7], number);
		}
	}
	return 0;
}
"""

RACE = rf"""
#include "hypercall.h"
#include "paging.h"
#include "ucall.h"
{DRAW}
#define PAGES	8

static volatile bool started;
static volatile unsigned finished;

/* Converts and touches pages that the others convert and touch; where a page's C-bit must change, its entry is set without a lock. */
static void play(const struct boot_info *boot, unsigned vcpu)
{{
	uint64_t state = 0x1234567 + 0x9e3779b97f4a7c15UL * (vcpu + 1), rounds = 0;

	argument_value(boot, "rounds", &rounds);
	for (uint64_t round = 0; round < rounds; round++) {{
		uint64_t number = draw_from(&state) % PAGES, pages = 1 + draw_from(&state) % (PAGES - number);
		uint64_t page = boot->test_area + number * PAGE_SIZE;

		if (draw_from(&state) % 2)
			make_private(page, pages);
		else
			make_shared(page, pages);
		*(volatile uint64_t *)(page + 8 * vcpu) += 1;
	}}
}}

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{{
	volatile uint64_t *word = (uint64_t *)boot->test_area;

	paging_start(boot);
	started = true;
	play(boot, vcpu);
	while (finished != boot->vcpus - 1)
		__builtin_ia32_pause();
	make_private(boot->test_area, PAGES);
	make_shared(boot->test_area, PAGES);
	*word = 0xfee1900d;
	ucall_sync(1, boot->test_area, PAGES);
	return 0;
}}

void guest_secondary(const struct boot_info *boot, unsigned vcpu)
{{
	while (!started)
		__builtin_ia32_pause();
	play(boot, vcpu);
	__atomic_add_fetch(&finished, 1, __ATOMIC_SEQ_CST);
	ucall_done_on(vcpu);
}}
"""

SLOTS = r"""
#include "ucall.h"

#define SLOT	0xb0000000UL
#define PAGES	16
#define STOP	(*(volatile uint64_t *)(UCALL_SHARED_PAGE + 0xf00))
#define ROUNDS	(*(volatile uint64_t *)(UCALL_SHARED_PAGE + 0xf08))

/* A page of the slot holds what was written to it last, or there is no memory: a device that nobody is answers with ones. */
unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	uint64_t rounds = 0, gone = 0;

	(void)boot;
	(void)vcpu;
	for (; !STOP; ROUNDS = ++rounds) {
		volatile uint64_t *word = (uint64_t *)(SLOT + rounds % PAGES * PAGE_SIZE);
		uint64_t value = *word;

		gone += value == ~0UL;
		CHECK(value == ~0UL || value % PAGE_SIZE == 0, "0x%lx holds 0x%lx, which nobody wrote", (uint64_t)word, value);
		*word = rounds * PAGE_SIZE;
	}
	ucall_sync(1, rounds, gone);
	for (unsigned page = 0; page < PAGES; page++)
		*(volatile uint64_t *)(SLOT + page * PAGE_SIZE) = 0xa11 + page;
	ucall_sync(2, SLOT, PAGES);
	return 0;
}
"""

FLOOD = rf"""
#include "ucall.h"
{DRAW}
static uint32_t line[1024];

/* Prints more than anyone wants to keep, and talks to ports that nobody has. */
unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{{
	uint64_t lines = 0, accesses = 0;

	(void)vcpu;
	argument_value(boot, "lines", &lines);
	argument_value(boot, "accesses", &accesses);
	memset(line, 'x', sizeof(line));
	while (lines--) {{
		const uint32_t *from = line;
		unsigned long count = COUNT(line);

		asm volatile("rep outsl" : "+S"(from), "+c"(count) : "d"(PORT_CONSOLE) : "memory");
	}}
	while (accesses--) {{
		uint16_t port = 0x1000 + accesses % 0x4000;

		GUEST_ASSERT_EQ(in32(port), 0xffffffff);
		out16(port, accesses);
	}}
	return 0;
}}
"""

NEIGHBOUR = r"""
#include "paging.h"
#include "ucall.h"

#define PAGES	16
#define WORDS	(PAGE_SIZE / 8)
#define FOREIGN	0xb0000000UL		/* another VM's secret, mapped as private, where there is an argument "foreign" */

static volatile uint64_t secret[2][WORDS] __attribute__((aligned(4096)));

static uint64_t search(const volatile uint64_t *words, unsigned count)
{
	uint64_t found = 0;

	for (unsigned i = 0; i < count; i++)
		found += words[i] >> 16 == 0x5ec7e75ec7e7UL;
	return found;
}

/* Says where its secret is; then tells how many words of such a secret it finds in pages that the host has put there. */
unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	uint64_t area = boot->test_area, found;

	(void)vcpu;
	paging_start(boot);
	for (unsigned i = 0; i < WORDS; i++)
		secret[0][i] = secret[1][i] = 0x5ec7e75ec7e70000UL + i;
	ucall_sync(1, (uint64_t)secret, area);
	make_private(area, PAGES);
	found = search((uint64_t *)area, PAGES * WORDS);
	if (argument(boot, "foreign"))
		found += search((uint64_t *)FOREIGN, 2 * WORDS);
	for (unsigned i = 0; i < WORDS; i++)
		GUEST_ASSERT_EQ(secret[0][i], 0x5ec7e75ec7e70000UL + i);
	ucall_sync(2, found);
	return 0;
}
"""
