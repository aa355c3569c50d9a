/* Threads that close, duplicate and reopen fds while others are inside ioctls on them: every answer is one that the kernel could give. */
#include "mini.h"

static struct machine m;
static volatile int stop;
static volatile int shared_fd;

static void *caller(void *bad)
{
	while (!stop) {
		long result = call(shared_fd, KVM_CHECK_EXTENSION, (void *)KVM_CAP_USER_MEMORY);

		if (result != 1 && result != -EBADF && result != -ENOTTY && result != -EIO)
			printf("an answer: %ld\n", result), ++*(int *)bad;
	}
	return NULL;
}

static void *closer(void *nothing)
{
	while (!stop) {
		int fd = open("/dev/kvm", O_RDWR), vm = ioctl(fd, KVM_CREATE_VM, 0);

		shared_fd = fd;
		close(fd);
		shared_fd = vm;
		close(vm);
	}
	return NULL;
}

static void *runner(void *nothing)
{
	return (void *)call(m.vcpu, KVM_RUN, 0);
}

static void ignore(int signal)
{
}

int main(void)
{
	struct sigaction action = { .sa_handler = ignore };
	pthread_t threads[4], spinning;
	volatile uint8_t *count;
	int bad = 0, vcpu, before;
	void *result;

	GUEST(&m, NULL, 16 * PAGE, SPIN);
	sigaction(SIGUSR1, &action, NULL);
	pthread_create(&spinning, NULL, runner, NULL);
	count = m.ram + 0x2000;
	for (int i = 0; i < 5000 && !*count; i++)
		usleep(1000);
	vcpu = m.vcpu;
	expect("close of a vCPU that runs", close(vcpu), 0);
	close(m.vm), close(m.kvm);
	before = *count;
	for (int i = 0; i < 5000 && *count == before; i++)
		usleep(1000);
	expect("the guest goes on", *count != before, 1);
	pthread_kill(spinning, SIGUSR1);
	pthread_join(spinning, &result);
	expect("and is interrupted", (long)result, -EINTR);
	expect("the fd is none", call(vcpu, KVM_RUN, 0), -EBADF);

	pthread_create(&threads[0], NULL, closer, NULL);
	for (int i = 1; i < 4; i++)
		pthread_create(&threads[i], NULL, caller, &bad);
	usleep(300000);
	stop = 1;
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	expect("answers that no kernel gives", bad, 0);
	GUEST(&m, NULL, 16 * PAGE, OUT_AND_HLT);
	expect("a new VM", run(&m), KVM_EXIT_IO);
	return verdict();
}
