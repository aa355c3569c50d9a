/* mmap of KVM's fds: a vCPU's kvm_run of the right size and only that; a VM and /dev/kvm have nothing to map. */
#include "mini.h"

static long map(int fd, size_t size, int prot, int flags, off_t offset)
{
	void *at = mmap(NULL, size, prot, flags, fd, offset);

	if (at == MAP_FAILED)
		return -errno;
	munmap(at, size);
	return 0;
}

int main(void)
{
	struct kvm_run *second;
	struct machine m;
	pid_t pid;
	int status;

	GUEST(&m, NULL, 16 * PAGE, OUT_FOR_EVER);
	expect("/dev/kvm", map(m.kvm, PAGE, PROT_READ, MAP_SHARED, 0), -ENODEV);
	expect("a VM", map(m.vm, PAGE, PROT_READ, MAP_SHARED, 0), -ENODEV);
	expect("a vCPU", map(m.vcpu, m.run_size, PROT_READ | PROT_WRITE, MAP_SHARED, 0), 0);
	expect("a vCPU, read only", map(m.vcpu, PAGE, PROT_READ, MAP_SHARED, 0), 0);
	expect("a vCPU's second page", map(m.vcpu, PAGE, PROT_READ, MAP_SHARED, PAGE), 0);
	expect("of no bytes", map(m.vcpu, 0, PROT_READ, MAP_SHARED, 0), -EINVAL);
	expect("at an odd offset", map(m.vcpu, PAGE, PROT_READ, MAP_SHARED, 8), -EINVAL);
	second = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, m.vcpu, 0);
	expect("run", run(&m), KVM_EXIT_IO);
	expect("a second map sees it", second->exit_reason, KVM_EXIT_IO);
	second->immediate_exit = 1;
	munmap(m.run, m.run_size);
	expect("through the second map alone", call(m.vcpu, KVM_RUN, 0), -EINTR);
	second->immediate_exit = 0;
	expect("it goes on", call(m.vcpu, KVM_RUN, 0), 0);
	expect("  exit", second->exit_reason, KVM_EXIT_IO);
	pid = fork();
	if (!pid)
		_exit(second->exit_reason == KVM_EXIT_IO ? 7 : 8);
	waitpid(pid, &status, 0);
	expect("a child reads the map", WEXITSTATUS(status), 7);
	munmap(second, PAGE);
	expect("without any map", call(m.vcpu, KVM_RUN, 0), 0);
	return verdict();
}
