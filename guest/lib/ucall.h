/*
 * ucall: how a test's guest talks to its test, over the shared page.
 *
 * Every vCPU has 64 bytes of the page (boot_info.shared_page), so the channel
 * needs no register and works where the host cannot read any (SEV-ES):
 *
 *	command, six arguments, answer		u64 each, at 64 * vCPU
 *
 * The guest writes the arguments, then the command, and leaves by a port OUT, or
 * by HLT if UCALL_HLT is defined before this header is included (a VM that must
 * not touch ports, as in the RFC's suite). The host reads the slot, clears the
 * command, may write an answer, and lets the guest go on.
 *
 * announce() uses the first word of the same page: a guest has the one or the other.
 */
#ifndef SEVMM_UCALL_H
#define SEVMM_UCALL_H

#include "guest.h"

#define PORT_UCALL	0xfa
#define UCALL_MAX_ARGS	6

enum { UCALL_NONE = 0, UCALL_SYNC = 1, UCALL_DONE = 2, UCALL_ABORT = 3 };

struct ucall {
	uint64_t command;
	uint64_t args[UCALL_MAX_ARGS];
	uint64_t answer;
};
_Static_assert(sizeof(struct ucall) == 64, "ucall slot");

#define UCALL_SHARED_PAGE	0x5000UL	/* boot_info.shared_page, for code that has no boot info at hand */

static inline uint64_t ucall_leave(unsigned vcpu, uint64_t command, const uint64_t *args, unsigned count)
{
	volatile struct ucall *slot = (volatile struct ucall *)UCALL_SHARED_PAGE + vcpu;

	for (unsigned i = 0; i < UCALL_MAX_ARGS; i++)
		slot->args[i] = i < count ? args[i] : 0;
	slot->answer = 0;
	slot->command = command;
#ifdef UCALL_HLT
	asm volatile("hlt" : : : "memory");
#else
	out32(PORT_UCALL, vcpu);
#endif
	return slot->answer;
}

/* SYNC with a stage and up to five more numbers, from vCPU 0 or a named one; the host's answer (0 if it gave none). */
#define ucall_sync(...)		ucall_sync_on(0, __VA_ARGS__)
#define ucall_sync_on(vcpu, ...)						\
	({									\
		const uint64_t ucall_args[] = { __VA_ARGS__ };			\
		_Static_assert(sizeof(ucall_args) <= 8 * UCALL_MAX_ARGS, "too many arguments"); \
		ucall_leave(vcpu, UCALL_SYNC, ucall_args, sizeof(ucall_args) / 8); \
	})

/* The end of this vCPU's part. Returning 0 from guest_main() means the same for vCPU 0. */
#define ucall_done()		ucall_done_on(0)
#define ucall_done_on(vcpu)	((void)ucall_leave(vcpu, UCALL_DONE, NULL, 0))

/* Failure: the line and up to five numbers. GUEST_ASSERT also prints what failed. */
#define ucall_abort(...)							\
	({									\
		const uint64_t ucall_args[] = { __LINE__, __VA_ARGS__ };	\
		(void)ucall_leave(0, UCALL_ABORT, ucall_args, sizeof(ucall_args) / 8); \
	})

/* With UCALL_HLT no port may be touched, so nothing is printed: line and numbers go to the host. */
#ifdef UCALL_HLT
#define GUEST_ASSERT(condition)							\
	do {									\
		if (!(condition)) {						\
			ucall_abort(0);						\
			guest_halt();						\
		}								\
	} while (0)
#define GUEST_ASSERT_EQ(actual, expected)					\
	do {									\
		uint64_t ucall_a = (actual), ucall_e = (expected);		\
		if (ucall_a != ucall_e) {					\
			ucall_abort(ucall_a, ucall_e);				\
			guest_halt();						\
		}								\
	} while (0)
#else
#define GUEST_ASSERT(condition)							\
	CHECK(condition, "%s:%d: %s", __FILE__, __LINE__, #condition)
#define GUEST_ASSERT_EQ(actual, expected)					\
	do {									\
		uint64_t ucall_a = (actual), ucall_e = (expected);		\
		CHECK(ucall_a == ucall_e, "%s:%d: %s is 0x%lx, expected 0x%lx (%s)", \
		      __FILE__, __LINE__, #actual, ucall_a, ucall_e, #expected); \
	} while (0)
#endif

#endif
