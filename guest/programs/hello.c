/*
 * hello: a guest runs, speaks and ends.
 *
 * 1. vCPU 0 prints "hello from sevmm", the VM type and the arguments if any.
 * 2. Every vCPU prints "hello from vCPU n" and counts itself as reported.
 * 3. vCPU 0 waits until all vCPUs have reported.
 * 4. The exit code is 0, or N of the argument exit=N.
 */
#include "guest.h"

static unsigned reported;

static void report(unsigned vcpu)
{
	print("hello from vCPU %u\n", vcpu);
	__atomic_add_fetch(&reported, 1, __ATOMIC_RELEASE);
}

void guest_secondary(const struct boot_info *boot, unsigned vcpu)
{
	(void)boot;
	report(vcpu);
}

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	uint64_t code = EXIT_PASS;

	print("hello from sevmm\n");
	print("vm type: %s\n", vm_type_name(boot->vm_type));
	if (boot->arguments[0])
		print("arguments: %s\n", boot->arguments);

	report(vcpu);
	while (__atomic_load_n(&reported, __ATOMIC_ACQUIRE) < boot->vcpus)
		__builtin_ia32_pause();

	argument_value(boot, "exit", &code);
	return code;
}
