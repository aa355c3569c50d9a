/*
 * What an instruction wants from a port or from memory, as far as the #VC
 * handler has to know: IN, OUT, INS, OUTS, and the moves and additions that a
 * compiler or this library's programs use on MMIO.
 */
#ifndef SEVMM_DECODE_H
#define SEVMM_DECODE_H

#include "guest.h"

enum operation {
	OP_IN, OP_OUT, OP_INS, OP_OUTS,
	OP_LOAD,		/* memory -> register of the same size */
	OP_LOAD_ZERO,		/* memory -> larger register, zero-extended */
	OP_LOAD_SIGN,		/* memory -> larger register, sign-extended */
	OP_STORE,		/* register -> memory */
	OP_STORE_VALUE,		/* immediate -> memory */
	OP_ADD,			/* memory += register, with flags */
};

struct instruction {
	enum operation operation;
	unsigned length;	/* bytes of the instruction */
	unsigned size;		/* bytes of one access */
	unsigned width;		/* bytes of the register, for OP_LOAD_* */
	bool repeat;		/* of a string: RCX times */
	uint16_t port;
	uint64_t address;	/* of the memory operand */
	uint64_t value;		/* of OP_STORE_VALUE */
	uint64_t *reg;		/* in the frame */
	unsigned shift;		/* 8 where the register is AH, CH, DH or BH, else 0 */
};

/* The instruction at `code`, with the registers of `frame`; false for any other. Reads no byte beyond its end. */
bool decode(const uint8_t *code, struct frame *frame, struct instruction *out);

/* The register of an instruction; writing 32 bits clears the upper half, less leaves the rest alone. */
uint64_t get_register(const struct instruction *in, unsigned size);
void set_register(const struct instruction *in, unsigned size, uint64_t value);

#endif
