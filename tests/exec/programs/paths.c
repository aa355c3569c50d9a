/* Wild pointers as paths, and as places for what is asked about a path. Pages: [0] writable, [1] not mapped, [2] readable, [3] not mapped. */
#include "mini.h"

int main(void)
{
	uint8_t *pages = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	const char *unfinished = (char *)pages + PAGE - 9, *bad[] = { NULL, (char *)8, (char *)pages + PAGE, (char *)0xffff888000000000, unfinished };
	struct stat *status = (void *)(pages + 2 * PAGE);
	char text[8];

	munmap(pages + PAGE, PAGE), munmap(pages + 3 * PAGE, PAGE);
	mprotect(pages + 2 * PAGE, PAGE, PROT_READ);
	memcpy(pages + PAGE - 9, "/dev/kvm/", 9); /* and no NUL before the page ends */
	for (int i = 0; i < 5; i++) {
		expect("open of a wild path", number(open(bad[i], O_RDWR)), -EFAULT);
		expect("access of it", number(access(bad[i], R_OK)), -EFAULT);
		expect("stat of it", number(syscall(SYS_stat, bad[i], text)), -EFAULT);
		expect("readlink of it", number(readlink(bad[i], text, sizeof(text))), -EFAULT);
	}
	expect("stat to a wild place", number(syscall(SYS_stat, "/dev/kvm", 8)), -EFAULT);
	expect("newfstatat to a read-only one", number(syscall(SYS_newfstatat, AT_FDCWD, "/dev/kvm", status, 0)), -EFAULT);
	expect("statx to a wild place", number(syscall(SYS_statx, AT_FDCWD, "/dev/kvm", 0, STATX_BASIC_STATS, 8)), -EFAULT);
	expect("openat2 with a wild how", number(syscall(SYS_openat2, AT_FDCWD, "/dev/kvm", 8, 24)), -EFAULT);
	memset(pages, '/', PAGE - 1), pages[PAGE - 1] = 0;
	expect("a path of 4095 slashes", number(open((char *)pages, O_RDONLY | O_DIRECTORY)) > 0, 1);
	expect("  of 4096", (pages[PAGE - 1] = '/', number(open((char *)pages, O_RDONLY))), -ENAMETOOLONG);
	return verdict();
}
