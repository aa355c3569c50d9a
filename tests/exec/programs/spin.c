/* A guest that spins until somebody ends the process; "ready" on stdout once it runs. Arguments: vCPUs, then what else:
 * "fork" does it in a child, too; "ignore" ignores SIGINT, SIGTERM and SIGHUP; "catch" ends with status 5 on SIGINT, and on nothing else.
 */
#include "mini.h"

static volatile int caught;

static void note(int signal)
{
	caught = signal;
}

static void *spin(void *vcpu)
{
	sigset_t set;

	sigemptyset(&set), sigaddset(&set, SIGINT);
	pthread_sigmask(SIG_BLOCK, &set, NULL); /* it is for the first thread, which may be on its way out of KVM_RUN */
	return (void *)call((int)(long)vcpu, KVM_RUN, 0);
}

int main(int argc, char **argv)
{
	int count = argc > 1 ? atoi(argv[1]) : 1;
	const char *how = argc > 2 ? argv[2] : "";
	struct sigaction action = { .sa_handler = note };
	volatile uint8_t *progress, *seen;
	pthread_t thread;
	void *ram;
	long result;
	struct machine m;

	if (!strcmp(how, "fork"))
		fork();
	if (!strcmp(how, "ignore"))
		signal(SIGINT, SIG_IGN), signal(SIGTERM, SIG_IGN), signal(SIGHUP, SIG_IGN);
	if (!strcmp(how, "catch"))
		sigaction(SIGINT, &action, NULL);
	ram = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0); /* a child looks at it */
	GUEST(&m, ram, 16 * PAGE, SPIN);
	for (int i = 1; i < count; i++) {
		struct kvm_run *run;
		int vcpu = add_vcpu(&m, i, &run);

		start_at(vcpu, ENTRY);
		pthread_create(&thread, NULL, spin, (void *)(long)vcpu);
	}
	progress = m.ram + 0x2000, seen = m.ram + 0x3000; /* the guest's counter has a byte, and is 0 every now and then */
	if (!fork()) {
		for (int i = 0; i < 10000 && !*seen; i++) {
			*seen = *progress != 0;
			usleep(1000);
		}
		printf("ready %d\n", getppid());
		fflush(stdout);
		_exit(0);
	}
	do
		result = run(&m);
	while (result == -EINTR && !caught && !strcmp(how, "catch")); /* it is stopped and continued, too */
	printf("run: %ld\n", result);
	printf("counted: %d\n", *seen);
	return caught == SIGINT ? 5 : 6;
}
