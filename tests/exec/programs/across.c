/* RAM on both sides of an address that is a whole number of GiB: a slot below it and one across it, then one above it, and the
 * guest reads from each what was stored there just before. It begins as one slot that no guest ever used.
 */
#include "mini.h"

#define SIZE (32 * MIB)
#define HIGH 0x100000UL
#define FROM_HIGH "\xb8\xff\xff\x8e\xd8\xa0\x10\x00\xe6\x10\xeb\xf4" /* 1: al = [ffff:0010]; out 0x10, al; jmp 1b */

static struct machine m;

int main(void)
{
	uint8_t *edge = (uint8_t *)0x7a0040000000, *ram = mmap(edge - 2 * MIB, SIZE, PROT_READ | PROT_WRITE,
							       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

	if (ram != edge - 2 * MIB)
		unavailable("that address");
	GUEST(&m, ram, SIZE, FROM_HIGH);
	expect("it goes", set_region(m.vm, 0, 0, ram, 0), 0);
	expect("below", set_region(m.vm, 0, 0, ram, HIGH - 16 * PAGE), 0);
	expect("across", set_region(m.vm, 1, HIGH, ram + HIGH, SIZE - HIGH), 0);
	for (int round = 1; round < 4; round++) {
		ram[HIGH] = round;
		expect("two slots", run(&m), KVM_EXIT_IO);
		expect("reads", io_byte(m.run), round);
	}
	expect("it goes", set_region(m.vm, 1, HIGH, ram + HIGH, 0), 0);
	expect("above", set_region(m.vm, 1, HIGH, edge, SIZE - 2 * MIB), 0);
	edge[0] = 7;
	expect("another slot", run(&m), KVM_EXIT_IO);
	expect("reads", io_byte(m.run), 7);
	return verdict();
}
