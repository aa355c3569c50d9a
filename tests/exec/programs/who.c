/* What a program is: ids, no_new_privs, the fds that it was given, signals ignored and blocked, its argv[0] and its terminal. */
#include "mini.h"
#include <dirent.h>
#include <sys/prctl.h>

int main(int argc, char **argv)
{
	struct sigaction action;
	struct dirent *entry;
	DIR *fds = opendir("/proc/self/fd");
	sigset_t blocked;

	printf("ids: %d %d\n", getuid(), geteuid());
	printf("argv:");
	for (int i = 0; i < argc; i++)
		printf(" [%s]", argv[i]);
	printf("\nterminal: %d %d %d\n", isatty(0), isatty(1), isatty(2));
	printf("foreground: %d\n", isatty(0) && tcgetpgrp(0) == getpgrp());
	printf("leads its group: %d\n", argc > 1 && getpgrp() == getpid());
	sigprocmask(SIG_SETMASK, NULL, &blocked);
	printf("signals:");
	for (int i = 1; i < 65; i++) {
		if (!sigaction(i, NULL, &action) && action.sa_handler != SIG_DFL)
			printf(" ignored %d", i);
		if (sigismember(&blocked, i) == 1)
			printf(" blocked %d", i);
	}
	printf("\nfds:");
	while ((entry = readdir(fds)))
		if (entry->d_name[0] != '.' && atoi(entry->d_name) != dirfd(fds))
			printf(" %s", entry->d_name);
	puts("");
	return 0;
}
