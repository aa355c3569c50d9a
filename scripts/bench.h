/* What both benchmarks need: an exit with the reason, and the time in microseconds. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static int check(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return result;
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}
