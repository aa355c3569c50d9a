/* What scripts/bench measures under `sevmm exec`, as a plain program; natively it measures the real /dev/kvm.
 *
 *     gcc -O2 -o bench_exec bench_exec.c && ./bench_exec WHAT [COUNT] [ROUNDS]
 *
 * WHAT: version, extension (trapped ioctls), out (exits of a guest that writes to a port), getpid, pipe (a byte written and read),
 * open (of /dev/null, and closed), kvm (of /dev/kvm, and closed): microseconds each, a line per round.
 * remap: a region of COUNT MiB of private memory, all of it touched, becomes a memory slot: microseconds for one slot.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "bench.h"

static int kvm = -1, vm = -1, vcpu = -1, ends[2];

static int slot(int number, unsigned long gpa, void *memory, unsigned long size)
{
	struct kvm_userspace_memory_region region = {
		.slot = number, .guest_phys_addr = gpa, .memory_size = size, .userspace_addr = (unsigned long)memory,
	};

	return check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
}

static char *private_memory(unsigned long size)
{
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	check(memory == MAP_FAILED ? -1 : 0, "mmap");
	return memory;
}

static void guest(void)
{
	struct kvm_regs regs = { .rip = 0x1000, .rflags = 2 };
	char *memory = private_memory(1 << 20);
	struct kvm_sregs sregs;

	memcpy(memory + 0x1000, "\xba\xf8\x03\xee\xeb\xfd", 6); /* mov dx, 0x3f8; 1: out dx, al; jmp 1b */
	slot(0, 0, memory, 1 << 20);
	vcpu = check(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs.base = sregs.cs.selector = 0;
	check(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static int one(const char *what)
{
	char byte = 0;

	switch (what[0]) {
	case 'v': return ioctl(kvm, KVM_GET_API_VERSION, 0) == 12;
	case 'e': return ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1;
	case 'g': return syscall(SYS_getpid) > 0;
	case 'p': return write(ends[1], &byte, 1) == 1 && read(ends[0], &byte, 1) == 1;
	case 'k': return close(open("/dev/kvm", O_RDWR | O_CLOEXEC)) == 0;
	case 'o': return what[1] == 'u' ? ioctl(vcpu, KVM_RUN, 0) == 0 : close(open("/dev/null", O_RDWR | O_CLOEXEC)) == 0;
	}
	return 0;
}

static double remap(long mib, int round)
{
	unsigned long size = (unsigned long)(mib ? mib : 1) << 20;
	char *memory = private_memory(size);
	double began;

	if (mib)
		memset(memory, round + 1, size);
	began = now();
	slot(1, 1UL << 32, memory, size);
	began = now() - began;
	if (mib && memory[size - 1] != (char)(round + 1))
		check(-1, "the contents");
	slot(1, 1UL << 32, memory, 0);
	munmap(memory, size);
	return began;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "version";
	long count = argc > 2 ? atol(argv[2]) : 10000, rounds = argc > 3 ? atol(argv[3]) : 3;

	check(pipe(ends), "pipe");
	if (what[0] != 'g' && what[0] != 'p') {
		kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
		vm = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	}
	if (!strcmp(what, "out"))
		guest();
	for (long round = 0; round < rounds; round++) {
		double began = now();

		if (!strcmp(what, "remap")) {
			printf("%.3f\n", remap(count, round));
			continue;
		}
		for (long i = 0; i < count; i++)
			if (!one(what))
				check(-1, what);
		printf("%.3f\n", (now() - began) / count);
	}
	return 0;
}
