/*
 * #VC, the exception by which an SEV-ES guest learns that an instruction of its
 * own would have left it.
 *
 * 1. The error code is the exit code that the host would have seen.
 * 2. What the instruction needs is put into this vCPU's GHCB and nothing else;
 *    the host is asked; what the instruction returns is taken out again.
 * 3. RIP moves on, or the exception that the host wants raised is raised.
 *
 * It is the host that makes #VC happen, and it may do so where there is nothing
 * to be emulated. So the bytes at RIP must be the instruction that the exit code
 * stands for, and an address that the host calls a device must be one that the
 * guest itself maps without the C-bit.
 *
 * Before the vCPU has a GHCB page only CPUID is possible, by the MSR protocol.
 * What cannot be dealt with is said on the console, where there is a page for it,
 * and ends the guest with a termination request. The handler itself uses no
 * instruction that the host intercepts; a #VC in it ends the guest too.
 */
#include "decode.h"
#include "vc.h"

#define CR4_OSXSAVE	(1UL << 18)
#define RFLAGS_DF	(1UL << 10)
#define RFLAGS_RF	(1UL << 16)	/* set in the frame of a fault; an instruction that is done clears it */
#define LEAF_XSTATE	0xd

enum {
	IOIO_IN = 1 << 0, IOIO_STRING = 1 << 2, IOIO_REPEAT = 1 << 3,
	IOIO_SIZE_SHIFT = 4,		/* then one bit for each of 1, 2 and 4 bytes */
	IOIO_ADDRESS_64 = 1 << 9, IOIO_SEGMENT_DS = 3 << 10, IOIO_PORT_SHIFT = 16,
};

/* Registers of plain instructions; only the lower half of each, unless WIDE. */
enum { RAX = 1, RBX = 2, RCX = 4, RDX = 8, CPL = 16, XCR0 = 32, WIDE = 64 };

/*
 * Instructions without operands in memory: their bytes, what the host has to
 * know, what it answers. A hypercall's fourth argument, RSI, is left out: none
 * here has one, and the host has no business with what else is in it.
 */
static const struct plain {
	uint64_t exit_code;
	uint8_t bytes[3], length;
	uint8_t info_1;
	uint8_t in, out;
} plains[] = {
	{ VC_CPUID, { 0x0f, 0xa2 }, 2, 0, RAX | RCX | XCR0, RAX | RBX | RCX | RDX },
	{ VC_MSR, { 0x0f, 0x32 }, 2, 0, RCX, RAX | RDX },
	{ VC_MSR, { 0x0f, 0x30 }, 2, 1, RAX | RCX | RDX, 0 },
	{ VC_VMMCALL, { 0x0f, 0x01, 0xd9 }, 3, 0, RAX | RBX | RCX | RDX | CPL | WIDE, RAX | WIDE },
	{ VC_RDTSC, { 0x0f, 0x31 }, 2, 0, 0, RAX | RDX },
	{ VC_RDTSCP, { 0x0f, 0x01, 0xf9 }, 3, 0, 0, RAX | RCX | RDX },
	{ VC_RDPMC, { 0x0f, 0x33 }, 2, 0, RCX, RAX | RDX },
	{ VC_INVD, { 0x0f, 0x08 }, 2, 0, 0, 0 },
	{ VC_WBINVD, { 0x0f, 0x09 }, 2, 0, 0, 0 },
	{ VC_MONITOR, { 0x0f, 0x01, 0xc8 }, 3, 0, RAX | RCX | RDX, 0 },
	{ VC_MWAIT, { 0x0f, 0x01, 0xc9 }, 3, 0, RAX | RCX, 0 },
};

_Noreturn void vc_give_up(const struct frame *frame, unsigned code, const char *why)
{
	const volatile uint8_t *bytes = (const volatile uint8_t *)frame->rip;

	ghcb_abandon();
	console_force_unlock();
	print("guest #VC: %s: exit code 0x%lx, rip 0x%lx, bytes %x %x %x\n",
	      why, frame->error, frame->rip, bytes[0], bytes[1], bytes[2]);
	ghcb_terminate(TERMINATE_SEVMM, code);
}

bool vc_ask(struct frame *frame, volatile struct ghcb *page, uint64_t code, uint64_t info_1, uint64_t info_2)
{
	uint64_t event = ghcb_ask(page, code, info_1, info_2);

	if (!event)
		return true;
	frame->vector = ghcb_event_vector(event);
	frame->error = ghcb_event_error(event);
	return false;
}

/* ---- instructions without operands in memory */

static bool at(uint64_t rip, const struct plain *plain)
{
	const volatile uint8_t *bytes = (const volatile uint8_t *)rip;

	for (unsigned i = 0; i < plain->length; i++)
		if (bytes[i] != plain->bytes[i])
			return false;
	return true;
}

static const struct plain *find_plain(const struct frame *frame)
{
	bool known = false;

	for (unsigned i = 0; i < sizeof(plains) / sizeof(plains[0]); i++) {
		if (plains[i].exit_code != frame->error)
			continue;
		known = true;
		if (at(frame->rip, &plains[i]))
			return &plains[i];
	}
	if (known)
		vc_give_up(frame, TERMINATE_DECODE, "not the instruction that the exit code stands for");
	vc_give_up(frame, TERMINATE_EXIT_CODE, "unknown exit code");
}

static uint64_t extended_state(void)
{
	uint64_t cr4;
	uint32_t low, high;

	asm volatile("movq %%cr4, %0" : "=r"(cr4));
	if (!(cr4 & CR4_OSXSAVE))
		return 1;
	asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
	return (uint64_t)high << 32 | low;
}

static bool plain(struct frame *frame)
{
	const struct plain *what = find_plain(frame);
	volatile struct ghcb *page = ghcb_open();
	uint64_t in = what->in & WIDE ? ~0UL : ~0U, out = what->out & WIDE ? ~0UL : ~0U;

	if (what->in & RAX)
		ghcb_set(page, rax, frame->rax & in);
	if (what->in & RBX)
		ghcb_set(page, rbx, frame->rbx & in);
	if (what->in & RCX)
		ghcb_set(page, rcx, frame->rcx & in);
	if (what->in & RDX)
		ghcb_set(page, rdx, frame->rdx & in);
	if (what->in & CPL)
		ghcb_set(page, cpl, frame->cs & 3);
	if (what->in & XCR0 && (uint32_t)frame->rax == LEAF_XSTATE)
		ghcb_set(page, xcr0, extended_state());
	if (!vc_ask(frame, page, what->exit_code, what->info_1, 0))
		return false;
	if (what->out & RAX)
		frame->rax = ghcb_get(page, rax) & out;
	if (what->out & RBX)
		frame->rbx = ghcb_get(page, rbx) & out;
	if (what->out & RCX)
		frame->rcx = ghcb_get(page, rcx) & out;
	if (what->out & RDX)
		frame->rdx = ghcb_get(page, rdx) & out;
	frame->rip += what->length;
	return true;
}

/* ---- ports */

/* Between the guest's memory and the page's buffer, whose address the host gets; a string in pieces that fit. */
static bool port_string(struct frame *frame, const struct instruction *what, uint64_t info)
{
	bool in = what->operation == OP_INS;
	uint64_t *index = in ? &frame->rdi : &frame->rsi;

	if (frame->rflags & RFLAGS_DF)
		vc_give_up(frame, TERMINATE_DECODE, "a string backwards");
	while (!what->repeat || frame->rcx) {
		volatile struct ghcb *page = ghcb_open();
		uint64_t most = GHCB_BUFFER_SIZE / what->size;
		uint64_t count = !what->repeat ? 1 : frame->rcx < most ? frame->rcx : most;

		if (!in)
			memcpy((void *)page->buffer, (const void *)*index, count * what->size);
		ghcb_set(page, scratch, (uint64_t)page->buffer);
		if (!vc_ask(frame, page, VC_IOIO, info, count))
			return false;
		if (in)
			memcpy((void *)*index, (const void *)page->buffer, count * what->size);
		*index += count * what->size;
		if (!what->repeat)
			break;
		frame->rcx -= count;
	}
	return true;
}

static bool port_register(struct frame *frame, const struct instruction *what, uint64_t info)
{
	volatile struct ghcb *page = ghcb_open();

	if (what->operation == OP_OUT)
		ghcb_set(page, rax, get_register(what, what->size));
	if (!vc_ask(frame, page, VC_IOIO, info, 0))
		return false;
	if (what->operation == OP_IN)
		set_register(what, what->size, ghcb_get(page, rax));
	return true;
}

static bool port_access(struct frame *frame)
{
	struct instruction what;
	uint64_t info;
	bool done;

	if (!decode((const uint8_t *)frame->rip, frame, &what) || what.operation > OP_OUTS)
		vc_give_up(frame, TERMINATE_DECODE, "an unknown port access");
	info = (uint64_t)what.port << IOIO_PORT_SHIFT | (uint64_t)what.size << IOIO_SIZE_SHIFT | IOIO_ADDRESS_64;
	if (what.operation == OP_IN || what.operation == OP_INS)
		info |= IOIO_IN;
	if (what.operation == OP_IN || what.operation == OP_OUT)
		done = port_register(frame, &what, info);
	else
		done = port_string(frame, &what, info | IOIO_STRING | (what.repeat ? IOIO_REPEAT : 0) |
				   (what.operation == OP_OUTS ? IOIO_SEGMENT_DS : 0));
	if (done)
		frame->rip += what.length;
	return done;
}

/* ---- the handler */

/* Without a page: CPUID by the MSR protocol, which knows no subleafs; all else is the end. */
static void early(struct frame *frame)
{
	uint32_t r[4];

	if (frame->error != VC_CPUID || !at(frame->rip, &plains[0]))
		ghcb_terminate(TERMINATE_SEVMM, TERMINATE_NO_PAGE);
	ghcb_cpuid_msr(frame->rax, r);
	frame->rax = r[0];
	frame->rbx = r[1];
	frame->rcx = r[2];
	frame->rdx = r[3];
	frame->rip += plains[0].length;
}

bool vc_handle(struct frame *frame)
{
	bool done;

	if (!ghcb_page()) {
		early(frame);
		return true;
	}
	if (!ghcb_hold())
		ghcb_terminate(TERMINATE_SEVMM, TERMINATE_NESTED);
	if (frame->error == VC_IOIO)
		done = port_access(frame);
	else if (frame->error == VC_NPF)
		done = vc_mmio(frame);
	else
		done = plain(frame);
	ghcb_release();
	if (done)
		frame->rflags &= ~RFLAGS_RF;
	return done;
}
