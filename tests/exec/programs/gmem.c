/* guest_memfd as a file: what it refuses, its size, fallocate, mmap with and without the flags, and as a guest's memory. */
#include "mini.h"
#include <setjmp.h>

static sigjmp_buf back;

static void escape(int signal)
{
	siglongjmp(back, signal);
}

static long create(int vm, uint64_t size, uint64_t flags)
{
	struct mini_guest_memfd argument = { .size = size, .flags = flags };

	return call(vm, MINI_CREATE_GUEST_MEMFD, &argument);
}

static void *map(int fd, int prot, int flags)
{
	return mmap(NULL, 4 * PAGE, prot, flags, fd, 0);
}

static long touch(volatile uint8_t *at)
{
	int signal = sigsetjmp(back, 1);

	if (signal)
		return -1000 - signal;
	return *at;
}

int main(void)
{
	struct machine m;
	struct mini_region2 region = { .slot = 1, .flags = MINI_MEM_GUEST_MEMFD, .gpa = MIB, .size = 4 * PAGE };
	struct stat status;
	uint8_t *view, *other;
	char byte = 0;
	long flags;
	int fd, copy;

	GUEST(&m, NULL, 16 * PAGE, OUT_AND_HLT);
	if (call(m.vm, KVM_CHECK_EXTENSION, (void *)MINI_CAP_GUEST_MEMFD) != 1)
		unavailable("guest_memfd");
	signal(SIGBUS, escape), signal(SIGSEGV, escape);
	fd = must(create(m.vm, 4 * PAGE, 0), "KVM_CREATE_GUEST_MEMFD");
	expect("of no bytes", create(m.vm, 0, 0), -EINVAL);
	expect("of half a page", create(m.vm, 2048, 0), -EINVAL);
	expect("a flag that is none", create(m.vm, PAGE, 1UL << 40), -EINVAL);
	expect("no O_CLOEXEC", fcntl(fd, F_GETFD), 0);
	for (int i = 0; i < 2; i++, fd = fcntl(fd, F_DUPFD, fd)) {
		expect("read", number(read(fd, &byte, 1)), -EINVAL);
		expect("write", number(write(fd, &byte, 1)), -EINVAL);
		expect("pread", number(pread(fd, &byte, 1, 0)), -ESPIPE);
		expect("pwrite", number(pwrite(fd, &byte, 1, 0)), -ESPIPE);
		expect("ftruncate", number(ftruncate(fd, PAGE)), -EINVAL);
		expect("fstat", number(fstat(fd, &status)), 0);
		expect("  size", status.st_size, 4 * PAGE);
		expect("  block size", status.st_blksize, PAGE);
		expect("mmap shared", map(fd, PROT_READ | PROT_WRITE, MAP_SHARED) == MAP_FAILED ? -errno : 0, -ENODEV);
		expect("mmap private", map(fd, PROT_READ, MAP_PRIVATE) == MAP_FAILED ? -errno : 0, -ENODEV);
		expect("allocate", number(fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, 2 * PAGE)), 0);
		expect("allocate beyond the end", number(fallocate(fd, FALLOC_FL_KEEP_SIZE, 4 * PAGE, PAGE)), -EINVAL);
		expect("allocate without KEEP_SIZE", number(fallocate(fd, 0, 0, PAGE)), -EOPNOTSUPP);
		expect("punch", number(fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, PAGE, PAGE)), 0);
		expect("punch unaligned", number(fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 1, PAGE)), -EINVAL);
		expect("an ioctl on it", call(fd, KVM_GET_API_VERSION, 0), -ENOTTY);
	}
	flags = call(m.vm, KVM_CHECK_EXTENSION, (void *)MINI_CAP_GUEST_MEMFD_FLAGS);
	if (flags < 3)
		unavailable("guest_memfd flags");
	fd = must(create(m.vm, 4 * PAGE, MINI_GMEM_MMAP), "MMAP");
	view = map(fd, PROT_READ | PROT_WRITE, MAP_SHARED);
	expect("private memory that is mapped", view != MAP_FAILED, 1);
	expect("  a touch", touch(view), -1000 - SIGBUS);
	fd = must(create(m.vm, 4 * PAGE, MINI_GMEM_MMAP | MINI_GMEM_INIT_SHARED), "MMAP|INIT_SHARED");
	expect("shared memory is not mapped private", map(fd, PROT_READ, MAP_PRIVATE) == MAP_FAILED ? -errno : 0, -EINVAL);
	view = map(fd, PROT_READ | PROT_WRITE, MAP_SHARED), other = map(fd, PROT_READ, MAP_SHARED);
	expect("shared memory is mapped", view != MAP_FAILED && other != MAP_FAILED, 1);
	expect("  empty", touch(view), 0);
	view[PAGE] = 42;
	expect("  both maps see a store", touch(other + PAGE), 42);
	expect("  the read-only one takes none", (sigsetjmp(back, 1) ? -SIGSEGV : (other[0] = 1)), -SIGSEGV);
	expect("  read is refused still", number(read(fd, &byte, 1)), -EINVAL);
	fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, PAGE, PAGE);
	expect("  a punched page is empty", touch(view + PAGE), 0);
	copy = dup(fd);
	close(fd);
	memcpy(view, ADD_AND_TELL, sizeof(ADD_AND_TELL));
	region.memfd = copy, region.hva = ADDRESS(view), region.gpa = 0, region.slot = 0;
	set_region(m.vm, 0, 0, m.ram, 0);
	region.gpa = ENTRY;
	expect("as the guest's memory", call(m.vm, MINI_SET_REGION2, &region), 0);
	close(copy);
	view[PAGE] = 9;
	start_at(m.vcpu, ENTRY);
	expect("  the guest runs in it", run(&m), KVM_EXIT_IO);
	expect("  and read", io_byte(m.run), 10);
	expect("  and wrote", touch(view + PAGE + 1), 10);
	return verdict();
}
