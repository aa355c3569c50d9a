/* Slots of touched private memory, one after the other, while something else goes on, named by the argument:
 * "signals" of all kinds come; "threads" come and go, and some write to the memory; "stop" and continue signals; "again" at
 * the same addresses; "ahead" in one large mapping; "quiet".
 */
#include "mini.h"
#include <sys/prctl.h>

#define SIZE (64 * PAGE)
#define WORDS (SIZE / sizeof(uint64_t))
#define WRITERS 3

static volatile int over, ticks, queued, pending;
static uint64_t *volatile shared_ram;
static struct { uint64_t *ram; uint64_t count; pthread_mutex_t lock; } writer[WRITERS];

static void tick(int number)
{
	if (number == SIGALRM)
		ticks++;
	else if (number == SIGUSR1)
		pending++;
	else
		__atomic_add_fetch(&queued, 1, __ATOMIC_SEQ_CST);
}

static void *queue_signals(void *sent)
{
	while (!over) {
		union sigval nothing = { 0 };

		if (!sigqueue(getpid(), SIGRTMIN, nothing))
			++*(int *)sent;
		usleep(300);
	}
	return NULL;
}

static void *nothing(void *unused)
{
	return unused;
}

static void *make_threads(void *unused)
{
	while (!over) {
		pthread_t thread;

		if (!pthread_create(&thread, NULL, nothing, NULL))
			pthread_join(thread, NULL);
	}
	return NULL;
}

/* Counts in a word of its own of whatever memory is the present one: a store that got lost is seen in the end. */
static void *count(void *index)
{
	long me = (long)index;

	while (!over) {
		pthread_mutex_lock(&writer[me].lock);
		if (writer[me].ram) {
			volatile uint64_t *word = writer[me].ram + 512 * (me + 1);

			for (int i = 0; i < 1000; i++, writer[me].count++)
				++*word;
		}
		pthread_mutex_unlock(&writer[me].lock);
	}
	return NULL;
}

static void writers_use(uint64_t *ram)
{
	for (int i = 0; i < WRITERS; i++) {
		pthread_mutex_lock(&writer[i].lock);
		if (writer[i].ram)
			if (writer[i].ram[512 * (i + 1)] != writer[i].count)
				failures++, printf("WRONG: writer %d lost %ld\n", i, (long)(writer[i].count - writer[i].ram[512 * (i + 1)]));
		writer[i].ram = ram;
		writer[i].count = ram ? ram[512 * (i + 1)] : 0;
		pthread_mutex_unlock(&writer[i].lock);
	}
}

static void fill(uint64_t *ram, int seed, int but_writers)
{
	for (unsigned i = 0; i < WORDS; i += 64)
		if (!(but_writers && i % 512 == 0))
			ram[i] = (uint64_t)seed << 32 | i;
}

static int filled(const uint64_t *ram, int seed, int but_writers)
{
	int wrong = 0;

	for (unsigned i = 0; i < WORDS; i += 64)
		if (!(but_writers && i % 512 == 0))
			wrong += ram[i] != ((uint64_t)seed << 32 | i);
	return wrong;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "quiet";
	int rounds = argc > 2 ? atoi(argv[2]) : 100, threads = !strcmp(what, "threads"), wrong = 0, sent = 0, stopper = 0;
	int kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm"), vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	struct itimerval often = { { 0, 500 }, { 0, 500 } }, never = { { 0, 0 }, { 0, 0 } };
	struct sigaction action = { .sa_handler = tick, .sa_flags = SA_RESTART };
	pthread_t thread[WRITERS + 2], signaller;
	sigset_t one;
	uint8_t *place = NULL;

	if (!strcmp(what, "signals")) {
		sigaction(SIGALRM, &action, NULL), sigaction(SIGUSR1, &action, NULL), sigaction(SIGRTMIN, &action, NULL);
		sigemptyset(&one), sigaddset(&one, SIGUSR1), sigprocmask(SIG_BLOCK, &one, NULL);
		raise(SIGUSR1);
		setitimer(ITIMER_REAL, &often, NULL);
		pthread_create(&signaller, NULL, queue_signals, &sent);
	}
	if (threads) {
		for (long i = 0; i < WRITERS; i++) {
			pthread_mutex_init(&writer[i].lock, NULL);
			pthread_create(&thread[i], NULL, count, (void *)i);
		}
		for (int i = 0; i < 2; i++)
			pthread_create(&thread[WRITERS + i], NULL, make_threads, NULL);
	}
	if (!strcmp(what, "stop") && !(stopper = fork())) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (;;)
			kill(getppid(), SIGSTOP), usleep(2000), kill(getppid(), SIGCONT), usleep(5000);
	}
	if (!strcmp(what, "ahead")) {
		place = mmap(NULL, SIZE * rounds, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		must(place == MAP_FAILED ? -1 : 0, "mmap");
	}
	for (int i = 0; i < rounds; i++) {
		uint64_t *ram = place ? (uint64_t *)(place + (size_t)SIZE * i) : fresh_ram(SIZE);
		int slot = !strcmp(what, "again") ? 0 : i;

		fill(ram, i, 0);
		if (threads)
			writers_use(ram);
		if (set_region(vm, slot, SIZE * slot, ram, SIZE))
			failures++, printf("WRONG: slot %d: %m\n", i);
		wrong += filled(ram, i, threads);
		fill(ram, i + 1, threads);
		wrong += filled(ram, i + 1, threads);
		if (threads)
			writers_use(NULL);
		if (!strcmp(what, "again")) {
			set_region(vm, slot, 0, ram, 0);
			munmap(ram, SIZE);
		}
	}
	over = 1;
	expect("contents that are not what they should be", wrong, 0);
	if (stopper)
		kill(stopper, SIGKILL), waitpid(stopper, NULL, 0), kill(getpid(), SIGCONT);
	if (threads)
		for (int i = 0; i < WRITERS + 2; i++)
			pthread_join(thread[i], NULL);
	if (!strcmp(what, "signals")) {
		pthread_join(signaller, NULL);
		setitimer(ITIMER_REAL, &never, NULL);
		expect("a blocked signal is still pending", pending, 0);
		sigprocmask(SIG_UNBLOCK, &one, NULL);
		expect("  and comes once", pending, 1);
		for (int i = 0; i < 1000 && queued < sent; i++)
			usleep(1000);
		expect("queued signals that got lost", sent - queued, 0);
		expect("timer signals came", ticks > 0, 1);
	}
	if (!strcmp(what, "again")) {
		char path[64], name[64];
		long files = 0, kib = 0;
		struct stat status;

		for (int i = 0; i < 1024; i++) {
			snprintf(path, sizeof(path), "/proc/%d/fd/%d", getppid(), i);
			memset(name, 0, sizeof(name));
			if (readlink(path, name, sizeof(name) - 1) > 0 && strstr(name, "guest-ram") && !stat(path, &status))
				files++, kib += status.st_blocks / 2;
		}
		expect("files of guest RAM that the supervisor keeps are few", files < 8, 1);
		expect("  and small", kib < 8 * SIZE / 1024, 1);
	}
	return verdict();
}
