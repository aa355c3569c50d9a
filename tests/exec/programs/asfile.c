/* An fd of KVM treated as a file: what else than ioctls and mmap it answers. Not all of that can be had under sevmm exec:
 * test_programs.py has the list.
 */
#include "mini.h"

static void link_of(const char *what, int fd, const char *wanted)
{
	char own[64], text[64] = "";

	snprintf(own, sizeof(own), "/proc/self/fd/%d", fd);
	expect(what, readlink(own, text, sizeof(text) - 1) > 0 && !strcmp(text, wanted), 1);
}

static void transfers(const char *what, int fd)
{
	char text[64], byte = 0;

	printf("%s\n", what);
	snprintf(text, sizeof(text), "%s: read", what), expect(text, number(read(fd, &byte, 1)), -EINVAL);
	snprintf(text, sizeof(text), "%s: write", what), expect(text, number(write(fd, &byte, 1)), -EINVAL);
	snprintf(text, sizeof(text), "%s: ftruncate", what), expect(text, number(ftruncate(fd, PAGE)), -EINVAL);
	snprintf(text, sizeof(text), "%s: fsync", what), expect(text, number(fsync(fd)), -EINVAL);
}

int main(void)
{
	struct mini_guest_memfd argument = { .size = PAGE };
	struct stat status;
	struct machine m;
	int gmem, status_of_child;
	char byte;
	pid_t pid;

	GUEST(&m, NULL, 16 * PAGE, OUT_AND_HLT);
	transfers("kvm", m.kvm);
	transfers("a VM", m.vm);
	transfers("a vCPU", m.vcpu);
	expect("kvm: fstat", fstat(m.kvm, &status) == 0 && S_ISCHR(status.st_mode), 1);
	link_of("kvm: link", m.kvm, "/dev/kvm");
	link_of("a VM: link", m.vm, "anon_inode:kvm-vm");
	link_of("a vCPU: link", m.vcpu, "anon_inode:kvm-vcpu:0");
	expect("a VM: private map", mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, m.vm, 0) == MAP_FAILED ? -errno : 0, -ENODEV);
	pid = vfork();
	if (!pid)
		_exit(call(m.vm, KVM_CHECK_EXTENSION, (void *)KVM_CAP_USER_MEMORY) == 1 ? 0 : 1);
	waitpid(pid, &status_of_child, 0);
	expect("a VM: used by a vforked child, whose memory is ours", status_of_child, 0);
	gmem = call(m.vm, MINI_CREATE_GUEST_MEMFD, &argument);
	if (gmem >= 0 && dup2(gmem, 20) == 20) {
		expect("a guest_memfd under a low number: read", number(read(20, &byte, 1)), -EINVAL);
		expect("a guest_memfd under a low number: pwrite", number(pwrite(20, &byte, 1, 0)), -ESPIPE);
	}
	expect("after all that it runs", run(&m), KVM_EXIT_IO);
	return verdict();
}
