/*
 * crash: a guest that dies of an exception nobody expects.
 *
 * 1. The argument chooses: ud2 (the default), pf, de, gp, or triple.
 * 2. The guest prints "crash: " and the choice.
 * 3. The exception's line follows and the exit code is EXIT_EXCEPTION (0x7f).
 *    triple loads an empty IDT first: no handler, the VM shuts down.
 */
#include "guest.h"

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	(void)vcpu;
	if (argument(boot, "pf")) {
		uint64_t address = 0x18;	/* page 0 is absent by contract */

		argument_value(boot, "pf", &address);
		print("crash: page fault at 0x%lx\n", address);
		asm volatile("movb $1, (%0)" : : "r"(address) : "memory");
	} else if (argument(boot, "de")) {
		print("crash: divide\n");
		asm volatile("xorl %%ecx, %%ecx; divl %%ecx" : : : "rax", "rcx", "rdx", "cc");
	} else if (argument(boot, "gp")) {
		print("crash: non-canonical address\n");
		asm volatile("movb $1, (%0)" : : "r"(1UL << 63) : "memory");
	} else if (argument(boot, "triple")) {
		struct { uint16_t limit; uint64_t base; } __attribute__((packed)) none = { 0, 0 };

		print("crash: triple fault\n");
		asm volatile("lidt %0; ud2" : : "m"(none));
	} else {
		print("crash: ud2\n");
		asm volatile("ud2");
	}
	print("crash: still alive\n");
	return EXIT_CHECK;
}
