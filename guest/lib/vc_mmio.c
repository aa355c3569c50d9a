/*
 * MMIO of an SEV-ES guest: #VC with the exit code of a nested page fault.
 *
 * 1. The instruction is decoded: a move in either direction, or an addition.
 * 2. Its address must be mapped, without the C-bit, or the host is after memory
 *    that is none of its business.
 * 3. The host reads or writes through the buffer in the GHCB page.
 */
#include "decode.h"
#include "paging.h"
#include "vc.h"

#define RFLAGS_ADD	0x8d5UL		/* CF PF AF ZF SF OF */

/* `size` bytes at `gpa`; what is read or written goes through the page's buffer. */
static bool device(struct frame *frame, uint64_t code, uint64_t gpa, unsigned size, uint64_t *value)
{
	volatile struct ghcb *page = ghcb_open();

	if (code == GHCB_MMIO_WRITE)
		*(volatile uint64_t *)page->buffer = *value;
	ghcb_set(page, scratch, (uint64_t)page->buffer);
	if (!vc_ask(frame, page, code, gpa, size))
		return false;
	if (code == GHCB_MMIO_READ)
		*value = *(volatile uint64_t *)page->buffer << (64 - 8 * size) >> (64 - 8 * size);
	return true;
}

static uint64_t sign_extend(uint64_t value, unsigned size)
{
	return (uint64_t)((int64_t)(value << (64 - 8 * size)) >> (64 - 8 * size));
}

/* value + other in `size` bytes, and its flags, which the CPU knows best. */
static uint64_t add(uint64_t value, uint64_t other, unsigned size, uint64_t *rflags)
{
	uint64_t flags;

	switch (size) {
	case 1:
		asm("addb %b2, %b0; pushfq; popq %1" : "+q"(value), "=r"(flags) : "q"(other) : "cc");
		break;
	case 2:
		asm("addw %w2, %w0; pushfq; popq %1" : "+r"(value), "=r"(flags) : "r"(other) : "cc");
		break;
	case 4:
		asm("addl %k2, %k0; pushfq; popq %1" : "+r"(value), "=r"(flags) : "r"(other) : "cc");
		break;
	default:
		asm("addq %2, %0; pushfq; popq %1" : "+r"(value), "=r"(flags) : "r"(other) : "cc");
	}
	*rflags = (*rflags & ~RFLAGS_ADD) | (flags & RFLAGS_ADD);
	return value;
}

/* The GPA of a device's register: a place that the guest maps as shared, in one page. Anything else is the end. */
static uint64_t device_address(const struct frame *frame, const struct instruction *what)
{
	bool encrypted;
	uint64_t gpa;

	if (!find_gpa(what->address, &gpa, &encrypted))
		vc_give_up(frame, TERMINATE_MMIO, "MMIO at an address that is not mapped");
	if (encrypted)
		vc_give_up(frame, TERMINATE_MMIO, "MMIO at an address that is private");
	if ((gpa & (PAGE_SIZE - 1)) + what->size > PAGE_SIZE)
		vc_give_up(frame, TERMINATE_DECODE, "MMIO across two pages");
	return gpa;
}

static bool load(struct frame *frame, const struct instruction *what, uint64_t gpa)
{
	uint64_t value;

	if (!device(frame, GHCB_MMIO_READ, gpa, what->size, &value))
		return false;
	if (what->operation == OP_LOAD_SIGN)
		value = sign_extend(value, what->size);
	set_register(what, what->operation == OP_LOAD ? what->size : what->width, value);
	return true;
}

bool vc_mmio(struct frame *frame)
{
	struct instruction what;
	uint64_t gpa, value;
	bool done;

	if (!decode((const uint8_t *)frame->rip, frame, &what) || what.operation < OP_LOAD)
		vc_give_up(frame, TERMINATE_DECODE, "an unknown access to a device");
	gpa = device_address(frame, &what);
	switch (what.operation) {
	case OP_STORE:
		value = get_register(&what, what.size);
		done = device(frame, GHCB_MMIO_WRITE, gpa, what.size, &value);
		break;
	case OP_STORE_VALUE:
		done = device(frame, GHCB_MMIO_WRITE, gpa, what.size, &what.value);
		break;
	case OP_ADD:
		done = device(frame, GHCB_MMIO_READ, gpa, what.size, &value);
		if (!done)
			break;
		value = add(value, get_register(&what, what.size), what.size, &frame->rflags);
		done = device(frame, GHCB_MMIO_WRITE, gpa, what.size, &value);
		break;
	default:
		done = load(frame, &what, gpa);
	}
	if (done)
		frame->rip += what.length;
	return done;
}
