/*
 * How an SEV-ES guest talks to its host.
 *
 * The host cannot see the guest's registers, so the guest puts what the host
 * may know into a page that both can read, the GHCB, and asks with VMGEXIT.
 * Before a vCPU has given the host its page, the GHCB MSR itself carries short
 * questions and answers: the MSR protocol.
 *
 * Layout and numbers: AMD's "SEV-ES Guest-Hypervisor Communication Block
 * Standardization" (56421), as struct ghcb and GHCB_MSR_* have them in Linux.
 *
 * What comes back is the host's word. It is read once, used only where the host
 * marked it as valid, and anything else ends the guest (ghcb_terminate).
 */
#ifndef SEVMM_GHCB_H
#define SEVMM_GHCB_H

#include "guest.h"

#define MSR_GHCB		0xc0010130
#define GHCB_BUFFER_SIZE	2032

struct ghcb {
	uint8_t reserved_0[0xcb];
	uint8_t cpl;
	uint8_t reserved_cc[0x140 - 0xcc];
	uint64_t xss;
	uint8_t reserved_148[0x1f8 - 0x148];
	uint64_t rax;
	uint8_t reserved_200[0x308 - 0x200];
	uint64_t rcx, rdx, rbx;
	uint8_t reserved_320[0x390 - 0x320];
	uint64_t exit_code, exit_info_1, exit_info_2, scratch;
	uint8_t reserved_3b0[0x3e8 - 0x3b0];
	uint64_t xcr0;
	uint8_t valid[16];		/* one bit for each 8 bytes before it */
	uint8_t reserved_400[0x800 - 0x400];
	uint8_t buffer[GHCB_BUFFER_SIZE];
	uint8_t reserved_ff0[10];
	uint16_t version;
	uint32_t usage;			/* 0: what this struct is */
};
_Static_assert(offsetof(struct ghcb, exit_code) == 0x390, "GHCB layout");
_Static_assert(offsetof(struct ghcb, valid) == 0x3f0, "GHCB layout");
_Static_assert(offsetof(struct ghcb, version) == 0xffa, "GHCB layout");
_Static_assert(sizeof(struct ghcb) == PAGE_SIZE, "GHCB layout");

/* Exit codes: why #VC came, and what the host is asked for. */
enum {
	VC_RDTSC = 0x6e,
	VC_RDPMC = 0x6f,
	VC_CPUID = 0x72,
	VC_INVD = 0x76,
	VC_IOIO = 0x7b,
	VC_MSR = 0x7c,
	VC_VMMCALL = 0x81,
	VC_RDTSCP = 0x87,
	VC_WBINVD = 0x89,
	VC_MONITOR = 0x8a,
	VC_MWAIT = 0x8b,
	VC_NPF = 0x400,		/* a #VC only: MMIO, asked for with the next two */
};
#define GHCB_MMIO_READ		0x80000001
#define GHCB_MMIO_WRITE		0x80000002
#define GHCB_NMI_COMPLETE	0x80000003
#define GHCB_RESET_HOLD		0x80000004
#define GHCB_JUMP_TABLE		0x80000005
#define GHCB_FEATURES		0x8000fffd
#define GHCB_TERMINATE		0x8000fffe

/* Why a guest gives up: `set` and `code` of a termination. Set 0 is the standard's. */
enum { TERMINATE_STANDARD = 0, TERMINATE_SEVMM = 14 };
enum { TERMINATE_GENERAL = 0, TERMINATE_VERSION = 1 };
enum {
	TERMINATE_NO_PAGE = 1,		/* something that needs a GHCB page before there is one */
	TERMINATE_DECODE = 2,		/* an instruction that the #VC handler does not know */
	TERMINATE_EXIT_CODE = 3,	/* a #VC for a reason that the handler does not know */
	TERMINATE_ANSWER = 4,		/* the host's answer is none */
	TERMINATE_NESTED = 5,		/* a #VC inside the #VC handler */
	TERMINATE_MMIO = 6,		/* the host calls private memory a device */
};

/*
 * Once per vCPU, before the first instruction that the host intercepts: agrees
 * on a version, gives the host this vCPU's page and clears it.
 */
void ghcb_start(const struct boot_info *boot, unsigned vcpu);

/* The vCPU that runs this, and its page; NULL before ghcb_start(). */
unsigned ghcb_index(void);
volatile struct ghcb *ghcb_page(void);
unsigned ghcb_version(void);

/*
 * A vCPU asks one question at a time: false if it is in the middle of one. An NMI
 * that comes meanwhile is handled, and the host hears of it with the release.
 */
bool ghcb_hold(void);
void ghcb_release(void);
void ghcb_abandon(void);		/* what held it was interrupted by an exception and is not gone back to */

/* An NMI was handled: the host keeps others back until it hears of it. Not on other VM types, where IRET tells. */
void ghcb_nmi_done(void);

/* A question: ghcb_open(), ghcb_set() for each input, ghcb_ask(), ghcb_get() for each output. */
volatile struct ghcb *ghcb_open(void);
void ghcb_mark(volatile struct ghcb *page, unsigned offset);
void ghcb_need(const volatile struct ghcb *page, unsigned offset);

#define ghcb_set(page, field, value)						\
	do {									\
		(page)->field = (value);					\
		ghcb_mark(page, offsetof(struct ghcb, field));			\
	} while (0)
#define ghcb_get(page, field)							\
	({ ghcb_need(page, offsetof(struct ghcb, field)); (page)->field; })

/*
 * Asks the host. 0: done. Otherwise the event that it wants raised in place of
 * the instruction, as ghcb_event_*() take it apart: #UD or #GP.
 */
uint64_t ghcb_ask(volatile struct ghcb *page, uint64_t code, uint64_t info_1, uint64_t info_2);
#define ghcb_event_vector(event)	((event) & 0xff)
#define ghcb_event_error(event)		((event) & 1UL << 11 ? (event) >> 32 : 0)

/* Questions that no #VC asks for, held and released. The MSR protocol's end with the page registered again. */
uint64_t ghcb_reset_hold(void);			/* not 0: a SIPI came */
uint64_t ghcb_reset_hold_msr(void);
uint64_t ghcb_features(void);
uint64_t ghcb_features_msr(void);
uint64_t ghcb_jump_table(void);
void ghcb_set_jump_table(uint64_t gpa);
void ghcb_cpuid_msr(uint32_t leaf, uint32_t r[4]);	/* EAX, EBX, ECX, EDX of subleaf 0 */
_Noreturn void ghcb_terminate(unsigned set, unsigned code);

/* vc.c: deals with a #VC. False: the frame now is the exception that the host wants raised. */
bool vc_handle(struct frame *frame);

#endif
