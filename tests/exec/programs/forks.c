/* A crowd: 500 children, sixteen at a time, that use /dev/kvm and die in all manners; and a fork bomb that a limit ends. */
#include "mini.h"
#include <sys/resource.h>

static void child(int i)
{
	int kvm = open("/dev/kvm", O_RDWR), vm;

	if (i % 4 == 3)
		_exit(call(kvm, KVM_GET_API_VERSION, 0) == 12 ? 0 : 1);
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (i % 4 == 0)
		kill(getpid(), SIGKILL);
	_exit(call(vm, KVM_CREATE_VCPU, 0) > 0 ? 0 : 1);
}

static int bomb(void)
{
	struct rlimit limit = { 64, 64 };
	pid_t leader = getpid();

	if (setrlimit(RLIMIT_NPROC, &limit))
		return 1;
	for (int i = 0; i < 10; i++)
		if (fork() < 0)
			break;
	close(open("/dev/kvm", O_RDWR));
	if (getpid() != leader) {
		usleep(300000);
		_exit(0);
	}
	while (wait(NULL) > 0)
		;
	return 0;
}

int main(int argc, char **argv)
{
	int status, failed = 0, killed = 0, running = 0;

	if (argc > 1)
		return bomb();
	for (int i = 0; i < 500 || running;) {
		if (i < 500 && running < 16) {
			pid_t pid = fork();

			if (!pid)
				child(i);
			must(pid, "fork"), i++, running++;
			continue;
		}
		wait(&status), running--;
		killed += WIFSIGNALED(status);
		failed += WIFEXITED(status) && WEXITSTATUS(status);
	}
	expect("children killed", killed, 125);
	expect("children that failed", failed, 0);
	return verdict();
}
