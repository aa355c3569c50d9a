/* The smallest VMM there can be, as a yardstick for the run loop: one vCPU in real mode that writes a byte to a port for ever.
 *
 *     gcc -O2 -o bench_exits bench_exits.c && ./bench_exits [EXITS] [ROUNDS]
 *
 * Prints one line per round: microseconds per exit. The guest is the same as scripts/bench's:
 * mov dx, 0x3f8; 1: out dx, al; jmp 1b.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#include "bench.h"

int main(int argc, char **argv)
{
	long exits = argc > 1 ? atol(argv[1]) : 100000, rounds = argc > 2 ? atol(argv[2]) : 3;
	int kvm = check(open("/dev/kvm", O_RDWR), "/dev/kvm");
	int vm = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	size_t size = 1 << 20;
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct kvm_userspace_memory_region region = { .memory_size = size, .userspace_addr = (unsigned long)memory };
	struct kvm_regs regs = { .rip = 0x1000, .rflags = 2 };
	struct kvm_sregs sregs;
	struct kvm_run *run;
	unsigned long bytes = 0;
	int vcpu;

	memcpy(memory + 0x1000, "\xba\xf8\x03\xee\xeb\xfd", 6);
	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
	vcpu = check(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	run = mmap(NULL, check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE"),
		   PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs.base = sregs.cs.selector = 0;
	check(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");

	while (rounds--) {
		double began = now();

		for (long i = 0; i < exits; i++) {
			check(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
			if (run->exit_reason != KVM_EXIT_IO || run->io.port != 0x3f8) {
				fprintf(stderr, "exit %u\n", run->exit_reason);
				return 1;
			}
			bytes += ((unsigned char *)run)[run->io.data_offset];
		}
		printf("%.3f\n", (now() - began) / exits);
		fflush(stdout);
	}
	return bytes == ~0UL;
}
