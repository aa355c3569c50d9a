/*
 * The decoder of the #VC handler, see decode.h. 64-bit code only.
 *
 * 1. Prefixes: 0x66, 0xf3 (of strings), one REX, each at most once. Segments are
 *    flat and FS and GS are not used, so no other prefix makes sense here.
 * 2. The opcode says what is done and how wide.
 * 3. ModRM, SIB and displacement give the address, immediates follow.
 *
 * It touches nothing but the bytes and the frame, so that it can be tested in a
 * process of the host.
 */
#include "decode.h"

enum { REX_B = 1, REX_X = 2, REX_R = 4, REX_W = 8 };

struct cursor {
	const uint8_t *at;
	struct frame *frame;
	uint8_t rex;
	bool narrow;			/* 0x66 */
};

static uint64_t *general(struct frame *frame, unsigned number)
{
	static const uint16_t places[16] = {
		offsetof(struct frame, rax), offsetof(struct frame, rcx), offsetof(struct frame, rdx), offsetof(struct frame, rbx),
		offsetof(struct frame, rsp), offsetof(struct frame, rbp), offsetof(struct frame, rsi), offsetof(struct frame, rdi),
		offsetof(struct frame, r8), offsetof(struct frame, r9), offsetof(struct frame, r10), offsetof(struct frame, r11),
		offsetof(struct frame, r12), offsetof(struct frame, r13), offsetof(struct frame, r14), offsetof(struct frame, r15),
	};

	return (uint64_t *)((uint8_t *)frame + places[number & 15]);
}

/* A little-endian number of `size` bytes, sign-extended. */
static uint64_t number(struct cursor *cursor, unsigned size)
{
	uint64_t value = 0;

	for (unsigned i = 0; i < size; i++)
		value |= (uint64_t)*cursor->at++ << (8 * i);
	if (size < 8 && value >> (8 * size - 1))
		value |= ~0UL << (8 * size);
	return value;
}

static unsigned operand_size(const struct cursor *cursor)
{
	return cursor->rex & REX_W ? 8 : cursor->narrow ? 2 : 4;
}

/* ModRM with a memory operand; `immediate` bytes follow it. False for a register operand. */
static bool memory(struct cursor *cursor, struct instruction *out, unsigned size, unsigned immediate)
{
	uint8_t modrm = *cursor->at++, mod = modrm >> 6, rm = modrm & 7;
	unsigned reg = (modrm >> 3 & 7) | (cursor->rex & REX_R ? 8 : 0);
	uint64_t address = 0;
	bool relative = false;

	if (mod == 3)
		return false;
	out->shift = size == 1 && !cursor->rex && reg >= 4 ? 8 : 0;
	out->reg = general(cursor->frame, out->shift ? reg - 4 : reg);
	if (rm == 4) {
		uint8_t sib = *cursor->at++, base = sib & 7;
		unsigned index = (sib >> 3 & 7) | (cursor->rex & REX_X ? 8 : 0);

		if (index != 4)
			address = *general(cursor->frame, index) << (sib >> 6);
		if (base == 5 && mod == 0)
			address += number(cursor, 4);
		else
			address += *general(cursor->frame, base | (cursor->rex & REX_B ? 8 : 0));
	} else if (rm == 5 && mod == 0) {
		address = number(cursor, 4);
		relative = true;
	} else {
		address = *general(cursor->frame, rm | (cursor->rex & REX_B ? 8 : 0));
	}
	if (mod)
		address += number(cursor, mod == 1 ? 1 : 4);
	if (relative)
		address += (uint64_t)cursor->at + immediate;
	out->address = address;
	return true;
}

static bool ports(struct cursor *cursor, uint8_t opcode, struct instruction *out)
{
	bool string = opcode < 0x70;

	out->operation = string ? (opcode & 2 ? OP_OUTS : OP_INS) : (opcode & 2 ? OP_OUT : OP_IN);
	out->size = !(opcode & 1) ? 1 : cursor->narrow ? 2 : 4;
	out->port = string || opcode & 8 ? cursor->frame->rdx : *cursor->at++;
	out->reg = &cursor->frame->rax;
	return string || !out->repeat;
}

static bool extended(struct cursor *cursor, struct instruction *out)
{
	uint8_t opcode = *cursor->at++;

	switch (opcode) {
	case 0xb6: case 0xb7: case 0xbe: case 0xbf:	/* movzx, movsx */
		out->operation = opcode & 8 ? OP_LOAD_SIGN : OP_LOAD_ZERO;
		out->size = opcode & 1 ? 2 : 1;
		out->width = operand_size(cursor);
		return memory(cursor, out, out->width, 0);
	default:
		return false;
	}
}

static bool moves(struct cursor *cursor, uint8_t opcode, struct instruction *out)
{
	unsigned immediate;

	out->size = opcode & 1 ? operand_size(cursor) : 1;
	switch (opcode) {
	case 0x00: case 0x01:
		out->operation = OP_ADD;
		return memory(cursor, out, out->size, 0);
	case 0x63:
		out->operation = OP_LOAD_SIGN;
		out->size = 4;
		out->width = 8;
		return cursor->rex & REX_W && memory(cursor, out, 8, 0);
	case 0x88: case 0x89:
		out->operation = OP_STORE;
		return memory(cursor, out, out->size, 0);
	case 0x8a: case 0x8b:
		out->operation = OP_LOAD;
		return memory(cursor, out, out->size, 0);
	case 0xc6: case 0xc7:
		out->operation = OP_STORE_VALUE;
		immediate = out->size == 8 ? 4 : out->size;
		if (*cursor->at >> 3 & 7 || !memory(cursor, out, out->size, immediate))
			return false;
		out->value = number(cursor, immediate);
		return true;
	default:
		return false;
	}
}

static bool body(struct cursor *cursor, struct instruction *out)
{
	uint8_t opcode = *cursor->at++;

	switch (opcode) {
	case 0x6c ... 0x6f: case 0xe4 ... 0xe7: case 0xec ... 0xef:
		return ports(cursor, opcode, out);
	case 0x0f:
		return !out->repeat && extended(cursor, out);
	default:
		return !out->repeat && moves(cursor, opcode, out);
	}
}

bool decode(const uint8_t *code, struct frame *frame, struct instruction *out)
{
	struct cursor cursor = { .at = code, .frame = frame };

	memset(out, 0, sizeof(*out));
	for (;; cursor.at++) {
		if (*cursor.at == 0x66 && !cursor.narrow)
			cursor.narrow = true;
		else if (*cursor.at == 0xf3 && !out->repeat)
			out->repeat = true;
		else
			break;
	}
	if ((*cursor.at & 0xf0) == 0x40)
		cursor.rex = *cursor.at++;
	if (!body(&cursor, out))
		return false;
	out->length = cursor.at - code;
	return true;
}

static uint64_t low(unsigned size)
{
	return size == 8 ? ~0UL : (1UL << 8 * size) - 1;
}

uint64_t get_register(const struct instruction *in, unsigned size)
{
	return *in->reg >> in->shift & low(size);
}

void set_register(const struct instruction *in, unsigned size, uint64_t value)
{
	uint64_t mask = size == 4 ? ~0UL : low(size) << in->shift;

	*in->reg = (*in->reg & ~mask) | ((value & low(size)) << in->shift & mask);
}
