/* Signals every 100 us, whose handler restarts nothing: calls that never fail with EINTR do not, and opens may be made again. */
#include "mini.h"

static volatile int signals;

static void on_signal(int number)
{
	signals++;
}

int main(void)
{
	struct sigaction action = { .sa_handler = on_signal };
	struct itimerval often = { { 0, 100 }, { 0, 100 } }, never = { 0 };
	time_t end = time(NULL) + 2;
	struct stat status;
	int failed[4] = { 0 }, kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm"), rounds = 0;

	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &often, NULL);
	for (; time(NULL) < end || rounds < 100; rounds++) {
		void *page = mmap(NULL, PAGE, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

		failed[0] += page == MAP_FAILED;
		failed[1] += stat("/", &status) < 0;
		failed[2] += access("/", F_OK) < 0;
		failed[3] += ioctl(kvm, KVM_GET_API_VERSION, 0) != 12;
		if (page != MAP_FAILED)
			munmap(page, PAGE);
	}
	setitimer(ITIMER_REAL, &never, NULL);
	expect("there were signals", signals > rounds / 100, 1);
	expect("mmap", failed[0], 0);
	expect("stat", failed[1], 0);
	expect("access", failed[2], 0);
	expect("ioctl", failed[3], 0);
	return verdict();
}
