/* What a program can ask about the device nodes before it opens them, by every call and path there is. Argument: the node. */
#include "mini.h"
#include <sys/sysmacros.h>
#include <sys/xattr.h>

struct open_how_ { uint64_t flags, mode, resolve; };

int main(int argc, char **argv)
{
	const char *node = argc > 1 ? argv[1] : "/dev/kvm";
	int dev = must(open("/dev", O_RDONLY | O_DIRECTORY | O_CLOEXEC), "/dev"), fd, again;
	char text[256], dotted[64], own[64];
	const char *name = node + 5;
	struct stat one, two;
	struct statx more;

	expect("stat", number(stat(node, &one)), 0);
	expect("  a character device", S_ISCHR(one.st_mode), 1);
	expect("  major", major(one.st_rdev), 10);
	expect("lstat", number(lstat(node, &two)), 0);
	expect("  the same node", one.st_rdev == two.st_rdev && one.st_ino == two.st_ino, 1);
	expect("fstatat of /dev", number(fstatat(dev, name, &two, 0)), 0);
	expect("  the same node", one.st_rdev == two.st_rdev, 1);
	expect("statx", number(statx(AT_FDCWD, node, 0, STATX_BASIC_STATS, &more)), 0);
	expect("  the same node", makedev(more.stx_rdev_major, more.stx_rdev_minor) == one.st_rdev && S_ISCHR(more.stx_mode), 1);
	expect("access F_OK", number(access(node, F_OK)), 0);
	expect("access R_OK|W_OK", number(access(node, R_OK | W_OK)), 0);
	expect("access X_OK", number(access(node, X_OK)), -EACCES);
	expect("faccessat of /dev", number(faccessat(dev, name, R_OK | W_OK, 0)), 0);
	expect("eaccess", number(faccessat(AT_FDCWD, node, R_OK | W_OK, AT_EACCESS)), 0);
	expect("readlink", number(readlink(node, text, sizeof(text))), -EINVAL);
	expect("getxattr", number((int)getxattr(node, "user.none", text, sizeof(text))), -ENODATA);
	expect("lgetxattr", number((int)lgetxattr(node, "system.posix_acl_access", text, sizeof(text))), -ENODATA);
	expect("listxattr", listxattr(node, text, sizeof(text)) >= 0, 1);
	expect("llistxattr", llistxattr(node, text, sizeof(text)) >= 0, 1);
	expect("stat with a slash behind it fails", stat(strcat(strcpy(text, node), "/"), &two), -1);

	snprintf(dotted, sizeof(dotted), "/dev/../dev//./%s", name);
	expect("stat of another spelling", number(stat(dotted, &two)), 0);
	fd = open(node, O_RDWR | O_CLOEXEC);
	expect("open", fd >= 0, 1);
	snprintf(own, sizeof(own), "/proc/self/fd/%d", fd);
	again = open(own, O_RDWR);
	expect("  opened through it", again >= 0 && call(again, KVM_GET_API_VERSION, 0) == call(fd, KVM_GET_API_VERSION, 0), 1);
	for (int i = 0; i < 4; i++) {
		const char *how[] = { "openat of /dev", "open of another spelling", "openat2", "open, read only" };
		int got = i == 0 ? openat(dev, name, O_RDWR) : i == 1 ? open(dotted, O_RDWR) : i == 3 ? open(node, O_RDONLY) :
			(int)syscall(SYS_openat2, dev, name, &(struct open_how_){ .flags = O_RDWR }, sizeof(struct open_how_));

		expect(how[i], got >= 0 && call(got, KVM_GET_API_VERSION, 0) == call(fd, KVM_GET_API_VERSION, 0), 1);
		close(got);
	}
	expect("O_CREAT|O_EXCL", number(open(node, O_RDWR | O_CREAT | O_EXCL, 0600)), -EEXIST);
	expect("O_DIRECTORY", number(open(node, O_RDWR | O_DIRECTORY)), -ENOTDIR);
	fd = open(node, O_PATH);
	expect("O_PATH takes no ioctl", call(fd, KVM_GET_API_VERSION, 0), -EBADF); /* or there is no such fd */
	snprintf(own, sizeof(own), "/proc/self/fd/%d", fd);
	if (fd >= 0)
		expect("  opened through it", call(open(own, O_RDWR), KVM_GET_API_VERSION, 0), call(open(node, O_RDWR), KVM_GET_API_VERSION, 0));
	expect("openat2 of too little", number(syscall(SYS_openat2, dev, name, &(struct open_how_){ .flags = O_RDWR }, 8)), -EINVAL);
	expect("openat2 with wrong flags", number(syscall(SYS_openat2, dev, name, &(struct open_how_){ .flags = ~0UL }, 24)), -EINVAL);
	expect("openat2 with a mode", number(syscall(SYS_openat2, dev, name, &(struct open_how_){ .mode = 1 }, 24)), -EINVAL);
	expect("openat2 beneath a directory", number(syscall(SYS_openat2, dev, node, &(struct open_how_){ .resolve = 8 }, 24)), -EXDEV);
	chdir("/dev");
	expect("relative to the current directory", (fd = open(name, O_RDWR)) >= 0, 1);
	expect("a name beside it", number(open(strcat(strcpy(text, node), "x"), O_RDWR)), -ENOENT);
	expect("a name under it fails", open(strcat(strcpy(text, node), "/x"), O_RDWR), -1);
	expect("no path", number(open((char *)8, O_RDWR)), -EFAULT);
	expect("an empty path", number(open("", O_RDWR)), -ENOENT);
	return verdict();
}
