/* /sys/module/kvm*: parameters are files that are read (and not written), as programs look for features. */
#include "mini.h"
#include <ctype.h>

static long read_all(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	long got = fd < 0 ? -errno : number(read(fd, text, size - 1));

	text[got > 0 ? got : 0] = 0;
	if (fd >= 0) {
		expect("  a second read", read(fd, text + size / 2, 1), 0);
		expect("  pread of the start", pread(fd, text + size / 2, 1, 0), 1);
		expect("    is the same", text[size / 2], text[0]);
		expect("  a write to it", number(write(fd, "x", 1)), -EBADF);
		close(fd);
	}
	return got;
}

int main(int argc, char **argv)
{
	char text[256] = "", path[128];
	struct stat status;
	FILE *file;

	for (int i = 1; i < argc; i++) {
		char *equals = strchr(argv[i], '=');

		*equals = 0;
		snprintf(path, sizeof(path), "/sys/module/%s", argv[i]);
		printf("%s\n", path);
		expect("  length", read_all(path, text, sizeof(text)), (long)strlen(equals + 1) + 1);
		expect("  value", strncmp(text, equals + 1, strlen(equals + 1)), 0);
		expect("  newline", text[strlen(equals + 1)], '\n');
		expect("  stat", number(stat(path, &status)), 0);
		expect("  a regular file", S_ISREG(status.st_mode), 1);
		expect("  access", number(access(path, R_OK)), 0);
		file = fopen(path, "r");
		expect("  fopen", file != NULL && fgetc(file) == equals[1], 1);
	}
	expect("one that is not there", read_all("/sys/module/kvm/parameters/no_such_thing", text, sizeof(text)), -ENOENT);
	return verdict();
}
