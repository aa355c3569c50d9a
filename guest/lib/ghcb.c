/*
 * The GHCB page and the MSR protocol, see ghcb.h.
 *
 * 1. Which vCPU is this? The task register says so: the VMM gave each vCPU a TSS
 *    of its own (docs/seams.md section 4), and reading TR is not intercepted.
 * 2. The MSR holds either the GPA of the vCPU's page or a question of the MSR
 *    protocol. It is written once by ghcb_start() and put back after each such
 *    question. Writing it is not intercepted; the host sees it at VMGEXIT.
 * 3. A question begins with an empty valid bitmap, so that nothing of an earlier
 *    one is taken for an input of this one.
 * 4. A question is asked from beginning to end (ghcb_hold). Only an NMI can come in
 *    between, and its end is told to the host when the page and the MSR are free.
 */
#include "ghcb.h"
#include "paging.h"

#define FIRST_TSS	0x18
#define TSS_STRIDE	16
#define MAX_VCPUS	64

enum {
	MSR_INFO = 0x001, MSR_INFO_ASK = 0x002,
	MSR_CPUID_ASK = 0x004, MSR_CPUID = 0x005,
	MSR_RESET_HOLD_ASK = 0x006, MSR_RESET_HOLD = 0x007,
	MSR_FEATURES_ASK = 0x080, MSR_FEATURES = 0x081,
	MSR_TERMINATE = 0x100,
};
#define MSR_PROTOCOL	0xfffUL

#define VERSION_MIN	1
#define VERSION_MAX	2

#define EVENT_VALID	(1UL << 31)
#define EVENT_TYPE	(7UL << 8)
#define EVENT_EXCEPTION	(3UL << 8)

static uint64_t pages;			/* GPA of vCPU 0's page; 0 before ghcb_start() */
static unsigned version;
static volatile bool held[MAX_VCPUS], nmi_late[MAX_VCPUS];

static void vmgexit(void)
{
	asm volatile(".byte 0xf3, 0x0f, 0x01, 0xd9" : : : "memory");	/* rep vmmcall; not every assembler knows the name */
}

static void write_msr(uint64_t value)
{
	asm volatile("wrmsr" : : "c"(MSR_GHCB), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)) : "memory");
}

static uint64_t read_msr(void)
{
	uint32_t low, high;

	asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(MSR_GHCB));
	return (uint64_t)high << 32 | low;
}

unsigned ghcb_index(void)
{
	uint16_t task;

	asm volatile("str %0" : "=r"(task));
	return (task - FIRST_TSS) / TSS_STRIDE;
}

volatile struct ghcb *ghcb_page(void)
{
	return pages ? (volatile struct ghcb *)(pages + ghcb_index() * PAGE_SIZE) : NULL;
}

unsigned ghcb_version(void)
{
	return version;
}

_Noreturn void ghcb_terminate(unsigned set, unsigned code)
{
	for (;;) {
		write_msr(MSR_TERMINATE | (uint64_t)set << 12 | (uint64_t)code << 16);
		vmgexit();
	}
}

bool ghcb_hold(void)
{
	volatile bool *own = &held[ghcb_index() % MAX_VCPUS];

	if (*own)
		return false;
	*own = true;
	return true;
}

void ghcb_abandon(void)
{
	if (pages)
		held[ghcb_index() % MAX_VCPUS] = false;
}

static void hold(void)
{
	if (!ghcb_hold())
		ghcb_terminate(TERMINATE_SEVMM, TERMINATE_NESTED);
}

/* One question of the MSR protocol, whose answer must be of the kind `answer`. */
static uint64_t ask_msr(uint64_t question, unsigned answer)
{
	uint64_t before, value;

	hold();
	before = read_msr();
	write_msr(question);
	vmgexit();
	value = read_msr();
	if ((value & MSR_PROTOCOL) != answer)
		ghcb_terminate(TERMINATE_SEVMM, TERMINATE_ANSWER);
	if (!(before & MSR_PROTOCOL))
		write_msr(before);
	ghcb_release();
	return value;
}

void ghcb_start(const struct boot_info *boot, unsigned vcpu)
{
	uint64_t info = ask_msr(MSR_INFO_ASK, MSR_INFO);
	unsigned most = info >> 48, least = info >> 32 & 0xffff;
	volatile struct ghcb *page;

	if (most < VERSION_MIN || least > VERSION_MAX || 1UL << (info >> 24 & 63) != boot->c_mask)
		ghcb_terminate(TERMINATE_STANDARD, most < VERSION_MIN || least > VERSION_MAX ? TERMINATE_VERSION : TERMINATE_GENERAL);
	version = most < VERSION_MAX ? most : VERSION_MAX;
	page = (volatile struct ghcb *)(boot->ghcbs + vcpu * PAGE_SIZE);
	for (unsigned i = 0; i < PAGE_SIZE / 8; i++)
		((volatile uint64_t *)page)[i] = 0;
	pages = boot->ghcbs;
	write_msr((uint64_t)page);
	CHECK(ghcb_page() == page, "vCPU %u has the task register of another one", vcpu);
	paging_start(boot);
}

void ghcb_mark(volatile struct ghcb *page, unsigned offset)
{
	page->valid[offset / 64] |= 1 << (offset / 8 & 7);
}

void ghcb_need(const volatile struct ghcb *page, unsigned offset)
{
	if (!(page->valid[offset / 64] >> (offset / 8 & 7) & 1))
		ghcb_terminate(TERMINATE_SEVMM, TERMINATE_ANSWER);
}

volatile struct ghcb *ghcb_open(void)
{
	volatile struct ghcb *page = ghcb_page();

	for (unsigned i = 0; i < sizeof(page->valid); i++)
		page->valid[i] = 0;
	page->version = version;
	page->usage = 0;
	return page;
}

uint64_t ghcb_ask(volatile struct ghcb *page, uint64_t code, uint64_t info_1, uint64_t info_2)
{
	uint64_t event;

	ghcb_set(page, exit_code, code);
	ghcb_set(page, exit_info_1, info_1);
	ghcb_set(page, exit_info_2, info_2);
	vmgexit();
	switch ((uint32_t)ghcb_get(page, exit_info_1)) {
	case 0:
		return 0;
	case 1:
		event = ghcb_get(page, exit_info_2);
		if (event & EVENT_VALID && (event & EVENT_TYPE) == EVENT_EXCEPTION &&
		    (ghcb_event_vector(event) == 6 || ghcb_event_vector(event) == 13))
			return event;
	}
	ghcb_terminate(TERMINATE_SEVMM, TERMINATE_ANSWER);
}

/* For questions that cannot raise an exception, because no instruction stands behind them. */
static uint64_t ask(uint64_t code, uint64_t info_1, uint64_t info_2)
{
	volatile struct ghcb *page = ghcb_open();

	if (ghcb_ask(page, code, info_1, info_2))
		ghcb_terminate(TERMINATE_SEVMM, TERMINATE_ANSWER);
	return ghcb_get(page, exit_info_2);
}

static uint64_t ask_held(uint64_t code, uint64_t info_1, uint64_t info_2)
{
	uint64_t answer;

	hold();
	answer = ask(code, info_1, info_2);
	ghcb_release();
	return answer;
}

/* Once more if an NMI came after the last look: nobody else would tell its end, and without it no other NMI comes. */
void ghcb_release(void)
{
	unsigned vcpu = ghcb_index() % MAX_VCPUS;

	for (;;) {
		while (nmi_late[vcpu]) {
			nmi_late[vcpu] = false;
			ask(GHCB_NMI_COMPLETE, 0, 0);
		}
		held[vcpu] = false;
		if (!nmi_late[vcpu])
			return;
		held[vcpu] = true;
	}
}

void ghcb_nmi_done(void)
{
	if (!pages)
		return;
	nmi_late[ghcb_index() % MAX_VCPUS] = true;
	if (ghcb_hold())
		ghcb_release();
}

uint64_t ghcb_reset_hold(void)
{
	return ask_held(GHCB_RESET_HOLD, 0, 0);
}

uint64_t ghcb_reset_hold_msr(void)
{
	return ask_msr(MSR_RESET_HOLD_ASK, MSR_RESET_HOLD) >> 12;
}

uint64_t ghcb_features(void)
{
	return ask_held(GHCB_FEATURES, 0, 0);
}

uint64_t ghcb_features_msr(void)
{
	return ask_msr(MSR_FEATURES_ASK, MSR_FEATURES) >> 12;
}

uint64_t ghcb_jump_table(void)
{
	return ask_held(GHCB_JUMP_TABLE, 1, 0);
}

void ghcb_set_jump_table(uint64_t gpa)
{
	ask_held(GHCB_JUMP_TABLE, 0, gpa);
}

void ghcb_cpuid_msr(uint32_t leaf, uint32_t r[4])
{
	for (uint64_t i = 0; i < 4; i++)
		r[i] = ask_msr(MSR_CPUID_ASK | i << 30 | (uint64_t)leaf << 32, MSR_CPUID) >> 32;
}
