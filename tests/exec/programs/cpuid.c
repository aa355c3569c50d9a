/* CPUID as a program that speaks to KVM sees it: in threads, forked children, new images, beside signals and stops.
 *   cpuid show            vendor and the leaf of SEV, from main, a thread, a forked child
 *   cpuid segv            a fault of the program's own reaches its handler, with the right address
 *   cpuid die             ... and kills it where there is none
 *   cpuid exec PROGRAM    becomes another program
 *   cpuid threadexec ...  the same, by a thread that is not the first
 *   cpuid stop            stops itself by SIGSTOP between two CPUIDs
 *   cpuid many            threads that come and go, each with its CPUIDs and a signal
 *   cpuid read FILE       opens a file first of all, and waits there if it is a FIFO
 *   cpuid spawn           runs a shell by vfork
 *   cpuid wait            children whose end is told by a pidfd and who can be waited for at once
 */
#include <cpuid.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *volatile device = "/dev/kvm";
static sigjmp_buf back;
static volatile sig_atomic_t signals;

static void show(const char *who)
{
	unsigned a, b, c, d, name[4] = {0};
	__cpuid_count(0, 0, a, name[0], name[2], name[1]);
	__cpuid_count(0x8000001f, 0, a, b, c, d);
	printf("%s %s sev %u cbit %u\n", who, (char *)name, a >> 1 & 1, b & 63);
	fflush(stdout);
}

static void *thread(void *arg) { show(arg); return 0; }
static void fault(int number, siginfo_t *info, void *context) { printf("fault at %p\n", info->si_addr); siglongjmp(back, 1); }
static void count(int number) { signals++; }

static void *busy(void *arg)
{
	unsigned a, b, c, d;
	for (int i = 0; i < 20; i++) {
		__cpuid_count(0, 0, a, b, c, d);
		if (b != 0x68747541)
			abort();
		pthread_kill(pthread_self(), SIGUSR1);
	}
	return 0;
}

static void *become(void *words)
{
	execvp(*(char **)words, words);
	return NULL;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "show";
	pthread_t threads[8];
	if (!strcmp(what, "show")) {
		show("main");
		pthread_create(threads, 0, thread, "thread");
		pthread_join(threads[0], 0);
		if (!fork()) {
			show("child");
			return 0;
		}
		wait(0);
	} else if (!strcmp(what, "segv")) {
		struct sigaction action = {.sa_sigaction = fault, .sa_flags = SA_SIGINFO};
		sigaction(SIGSEGV, &action, 0);
		if (!sigsetjmp(back, 1))
			*(volatile int *)0x1234 = 1;
		show("after");
	} else if (!strcmp(what, "die")) {
		show("before");
		*(volatile int *)0x1234 = 1;
	} else if (!strcmp(what, "threadexec")) {
		pthread_t thread;

		pthread_create(&thread, NULL, become, argv + 2);
		pthread_join(thread, NULL);
	} else if (!strcmp(what, "exec")) {
		show("old");
		execvp(argv[2], argv + 2);
	} else if (!strcmp(what, "stop")) {
		show("before");
		printf("pid %d\n", getpid());
		fflush(stdout);
		raise(SIGSTOP);
		show("after");
	} else if (!strcmp(what, "read")) {
		char word[8] = "";
		int fd = open(argv[2], O_RDONLY);
		printf("fd %d, read %zd %s\n", fd, read(fd, word, 7), word);
		show("main");
	} else if (!strcmp(what, "spawn")) {
		printf("status %d\n", WEXITSTATUS(system("exit 3")));
		show("main");
	} else if (!strcmp(what, "many")) {
		signal(SIGUSR1, count);
		for (int round = 0; round < 5; round++) {
			for (int i = 0; i < 8; i++)
				pthread_create(&threads[i], 0, busy, 0);
			for (int i = 0; i < 8; i++)
				pthread_join(threads[i], 0);
		}
		printf("signals %d\n", (int)signals);
	} else {
		for (int i = 0; i < 30; i++) {
			pid_t child = fork();
			if (!child)
				_exit(i);
			int status = -1, fd = syscall(SYS_pidfd_open, child, 0);
			struct pollfd p = {.fd = fd, .events = POLLIN};
			poll(&p, 1, -1);
			if (waitpid(child, &status, WNOHANG) != child || WEXITSTATUS(status) != i)
				return printf("child %d: status %d\n", i, status), 1;
			close(fd);
		}
		puts("waited");
	}
	return device[0] == 0;
}
