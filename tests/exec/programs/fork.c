/* A VM belongs to the process that made it: a forked child's calls fail with EIO, its own VM works, and the parent goes on.
 * With the argument "exec": exec closes what is O_CLOEXEC, keeps the rest, and the new image can start afresh.
 */
#include "mini.h"

static void child(struct machine *m)
{
	struct machine own;
	struct kvm_regs regs;

	expect("child: the VM", call(m->vm, KVM_CREATE_VCPU, (void *)1), -EIO);
	expect("child: KVM_CHECK_EXTENSION of the VM", call(m->vm, KVM_CHECK_EXTENSION, (void *)KVM_CAP_USER_MEMORY), -EIO);
	expect("child: KVM_RUN", call(m->vcpu, KVM_RUN, 0), -EIO);
	expect("child: KVM_GET_REGS", call(m->vcpu, KVM_GET_REGS, &regs), -EIO);
	expect("child: no such call", call(m->vcpu, 0xAEFF, 0), -EIO);
	expect("child: /dev/kvm's fd", call(m->kvm, KVM_GET_API_VERSION, 0), 12);
	close(m->vm), close(m->vcpu);
	GUEST(&own, NULL, 16 * PAGE, OUT_AND_HLT);
	expect("child: its own VM", run(&own), KVM_EXIT_IO);
	_exit(verdict());
}

static int after_exec(char **argv)
{
	expect("an O_CLOEXEC fd", call(atoi(argv[2]), KVM_GET_API_VERSION, 0), -EBADF);
	expect("a kept fd of /dev/kvm", call(atoi(argv[3]), KVM_GET_API_VERSION, 0), 12);
	expect("a kept VM", call(atoi(argv[4]), KVM_CHECK_EXTENSION, (void *)KVM_CAP_USER_MEMORY), -EIO);
	expect("a kept vCPU", call(atoi(argv[5]), KVM_RUN, 0), -EIO);
	for (int i = 0; i < 3; i++) {
		struct machine m;

		GUEST(&m, NULL, 16 * PAGE, OUT_AND_HLT);
		expect("the new image's VM", run(&m), KVM_EXIT_IO);
	}
	return verdict();
}

int main(int argc, char **argv)
{
	char text[3][12], *again[] = { argv[0], "after", text[0], text[1], text[2], NULL, NULL };
	struct machine m;
	int status, kept, vm, vcpu;
	char vcpu_text[12];
	pid_t pid;

	if (argc > 5)
		return after_exec(argv);
	GUEST(&m, NULL, 16 * PAGE, OUT_FOR_EVER);
	expect("before fork", run(&m), KVM_EXIT_IO);
	if (argc > 1) {
		vm = dup(m.vm), vcpu = dup(m.vcpu), kept = dup(m.kvm);
		sprintf(text[0], "%d", m.kvm), sprintf(text[1], "%d", kept), sprintf(text[2], "%d", vm);
		sprintf(vcpu_text, "%d", vcpu);
		again[5] = vcpu_text;
		must(execv("/proc/self/exe", again), "execv");
	}
	for (int i = 0; i < 3; i++) {
		pid = fork();
		if (!pid)
			child(&m);
		expect("parent beside its child", run(&m), KVM_EXIT_IO);
		waitpid(pid, &status, 0);
		expect("child's status", status, 0);
		expect("parent afterwards", run(&m), KVM_EXIT_IO);
	}
	return verdict();
}
