/* Fds of KVM are fds: duplicates, the order of closing, O_CLOEXEC, close_range, and what still works after which close. */
#include "mini.h"
#include <poll.h>

#define CLOSE_RANGE(first, last, flags) number(syscall(SYS_close_range, first, last, flags))

int main(void)
{
	struct machine m, other;
	int copy, high, again;
	char own[64];

	GUEST(&m, NULL, 16 * PAGE, OUT_FOR_EVER);
	expect("lowest free fds", m.kvm == 3 && m.vm == 4 && m.vcpu == 5, 1);
	expect("O_CLOEXEC asked for", fcntl(m.kvm, F_GETFD), FD_CLOEXEC);
	expect("  of a VM", fcntl(m.vm, F_GETFD), FD_CLOEXEC);
	expect("  of a vCPU", fcntl(m.vcpu, F_GETFD), FD_CLOEXEC);
	expect("access mode of kvm", fcntl(m.kvm, F_GETFL) & O_ACCMODE, O_RDWR);
	expect("  of a VM", fcntl(m.vm, F_GETFL) & O_ACCMODE, O_RDWR);
	again = open("/dev/kvm", O_RDONLY);
	expect("without O_CLOEXEC", fcntl(again, F_GETFD), 0);
	expect("access mode of a read-only one", fcntl(again, F_GETFL) & O_ACCMODE, O_RDONLY);
	expect("  it answers as well", call(again, KVM_GET_API_VERSION, 0), 12);
	snprintf(own, sizeof(own), "/proc/self/fd/%d", m.vm);
	expect("a VM opened through its link", number(open(own, O_RDWR)), -ENXIO);
	snprintf(own, sizeof(own), "/proc/self/fd/%d", m.vcpu);
	expect("  a vCPU", number(open(own, O_RDONLY)), -ENXIO);
	expect("  it is still one", run(&m), KVM_EXIT_IO);
	close(again);

	copy = dup(m.vcpu);
	high = fcntl(m.vcpu, F_DUPFD_CLOEXEC, 700);
	expect("F_DUPFD", high, 700);
	expect("dup2", dup2(m.vm, 900), 900);
	close(m.vcpu), close(m.kvm), close(m.vm);
	m.vcpu = copy;
	expect("KVM_RUN through a duplicate", run(&m), KVM_EXIT_IO);
	m.vcpu = high;
	expect("through the other", run(&m), KVM_EXIT_IO);
	expect("the VM's duplicate", call(900, KVM_CHECK_EXTENSION, (void *)KVM_CAP_USER_MEMORY), 1);
	expect("a vCPU of the VM's duplicate", call(900, KVM_CREATE_VCPU, (void *)1) > 0, 1);
	expect("the same id again", call(900, KVM_CREATE_VCPU, (void *)1), -EEXIST);
	close(900);
	expect("KVM_RUN when the VM's last fd is closed", run(&m), KVM_EXIT_IO);
	expect("a VM's call on a vCPU", call(m.vcpu, KVM_CREATE_VCPU, (void *)2) < 0, 1);
	expect("dup2 over a vCPU", dup2(1, copy), copy);
	expect("  it is another file now", call(copy, KVM_RUN, 0), -ENOTTY);
	expect("the map outlives all fds", (close(high), m.run->exit_reason), KVM_EXIT_IO);
	expect("and is unmapped", munmap(m.run, m.run_size), 0);
	close(copy);

	GUEST(&other, NULL, 16 * PAGE, OUT_FOR_EVER);
	expect("a number that was a vCPU's is anew what was opened", call(other.vm, KVM_CHECK_EXTENSION, (void *)KVM_CAP_USER_MEMORY), 1);
	expect("a new VM runs", run(&other), KVM_EXIT_IO);
	expect("close_range", CLOSE_RANGE(3, ~0U, 0), 0);
	expect("  its kvm_run is still mapped", other.run->exit_reason, KVM_EXIT_IO);
	expect("  its fd is none", call(other.vcpu, KVM_RUN, 0), -EBADF);
	for (int i = 0; i < 50; i++) {
		GUEST(&other, NULL, 16 * PAGE, OUT_FOR_EVER);
		if (run(&other) != KVM_EXIT_IO)
			expect("one of fifty VMs", i, -1);
		if (i % 2)
			munmap(other.run, other.run_size);
		close(i % 3 ? other.vm : other.vcpu);
		CLOSE_RANGE(3, ~0U, 0);
		if (!(i % 2))
			munmap(other.run, other.run_size);
		munmap(other.ram, 16 * PAGE);
	}
	return verdict();
}
