/* Processes of unusual shape: a thread with fds of its own, a process whose first thread has ended. */
#include "mini.h"
#include <sched.h>

static struct machine m;

/* A guest that tells by an eventfd, on a VM that was made here. */
static void whole(const char *what, void *ram)
{
	struct kvm_ioeventfd tell = { .addr = 0x10, .len = 1, .flags = KVM_IOEVENTFD_FLAG_PIO };
	uint64_t count = 0;

	printf("- %s\n", what);
	GUEST(&m, ram, 16 * PAGE, OUT_AND_HLT);
	tell.fd = must(eventfd(0, EFD_NONBLOCK), "eventfd");
	expect("KVM_IOEVENTFD", call(m.vm, KVM_IOEVENTFD, &tell), 0);
	expect("run", run(&m), KVM_EXIT_HLT);
	expect("read", number(read(tell.fd, &count, sizeof(count))), sizeof(count));
	expect("told", count, 1);
}

static void every(void)
{
	int memfd = must(memfd_create("ram", 0), "memfd_create");
	void *shared, *file;

	must(ftruncate(memfd, 16 * PAGE), "ftruncate");
	shared = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	file = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	whole("private memory", NULL);
	m.ram[0x3000] = 1;
	expect("dropped", number(madvise(m.ram, 16 * PAGE, MADV_DONTNEED)), 0);
	expect("is zero", m.ram[0x3000], 0);
	whole("shared memory", shared);
	whole("a memfd", file);
}

static void guarded(void)
{
	struct mini_guest_memfd one = { .size = PAGE };
	int kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm");
	int vm = ioctl(kvm, KVM_CREATE_VM, 1);
	struct stat status;

	if (vm < 0)
		return; /* natively there may be no such type */
	for (int i = 0; i < 2; i++) {
		int memfd = call(vm, MINI_CREATE_GUEST_MEMFD, &one);

		expect("a guest_memfd", memfd >= 0, 1);
		fstat(memfd, &status);
		expect("size", status.st_size, PAGE);
	}
}

static void *apart(void *nothing)
{
	must(unshare(CLONE_FILES), "unshare");
	for (int i = 0; i < 20; i++) /* so that the numbers that follow are free in the other table */
		dup(0);
	every();
	guarded();
	return NULL;
}

static void *alone(void *first)
{
	pthread_join(*(pthread_t *)first, NULL);
	every();
	guarded();
	exit(verdict());
}

int main(int count, char **words)
{
	static pthread_t first;
	pthread_t thread;

	first = pthread_self();
	if (count > 1 && !strcmp(words[1], "apart")) {
		must(pthread_create(&thread, NULL, apart, NULL) ? -1 : 0, "a thread");
		pthread_join(thread, NULL);
		return verdict();
	}
	if (count > 1 && !strcmp(words[1], "used")) /* before the first thread ends */
		close(must(open("/dev/kvm", O_RDWR), "/dev/kvm"));
	must(pthread_create(&thread, NULL, alone, &first) ? -1 : 0, "a thread");
	pthread_exit(NULL);
}
