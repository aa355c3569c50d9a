/*
 * spin: a guest that never ends, for timeouts and kicks.
 *
 * 1. It prints "spin: spinning", so that a test knows that it runs.
 * 2. It stays in a loop without exits; with the argument hlt it halts instead,
 *    with interrupts off.
 */
#include "guest.h"

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	(void)vcpu;
	print("spin: spinning\n");
	if (argument(boot, "hlt"))
		guest_halt();
	for (;;)
		asm volatile("pause");
}
