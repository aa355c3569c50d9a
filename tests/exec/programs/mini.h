/* What the test programs share: a tiny VMM on plain ioctls, and a way to say what was found.
 *
 * A program tells one fact per line with `expect(what, got, wanted)`: the value, and whether it is the wanted one. Errors are
 * -errno, shown by name. It ends with `return verdict()`: 0 when every fact was as wanted, else 1; 77 means that this
 * machine lacks what the program is about (`unavailable`). The same program runs natively on /dev/kvm and under `sevmm exec`.
 */
#ifndef MINI_H
#define MINI_H
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define MIB (1UL << 20)
#define ENTRY 0x1000UL /* where guests start */
#define ADDRESS(p) ((unsigned long)(p))

/* Since Linux 6.8; distributions' headers may be older. */
struct mini_guest_memfd { uint64_t size, flags, reserved[6]; };
struct mini_region2 { uint32_t slot, flags; uint64_t gpa, size, hva, offset; uint32_t memfd, pad1; uint64_t pad2[14]; };
#define MINI_CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct mini_guest_memfd)
#define MINI_SET_REGION2 _IOW(KVMIO, 0x49, struct mini_region2)
#define MINI_CAP_GUEST_MEMFD 234
#define MINI_CAP_GUEST_MEMFD_FLAGS 244
#define MINI_MEM_GUEST_MEMFD 4
#define MINI_GMEM_MMAP 1
#define MINI_GMEM_INIT_SHARED 2

static int failures;

static inline const char *named(long value, char *text, size_t size)
{
	if (value < 0 && value > -4096)
		snprintf(text, size, "-%s", strerrorname_np(-value));
	else
		snprintf(text, size, "%ld", value);
	return text;
}

static inline void expect(const char *what, long got, long wanted)
{
	char one[40], two[40];

	printf("%s: %s", what, named(got, one, sizeof(one)));
	if (got != wanted) {
		printf("  WRONG, wanted %s", named(wanted, two, sizeof(two)));
		failures++;
	}
	puts("");
	fflush(stdout);
}

static inline int verdict(void)
{
	printf("wrong: %d\n", failures);
	return failures != 0;
}

static inline void unavailable(const char *what)
{
	printf("unavailable: %s\n", what);
	exit(77);
}

/* The result of a call in the libc's way, as a number: what it returned, or -errno. */
static inline long number(long result)
{
	return result == -1 ? -errno : result;
}

static inline long call(int fd, unsigned long request, const void *argument)
{
	return number(ioctl(fd, request, argument));
}

static inline int must(long result, const char *what)
{
	if (result == -1) {
		printf("%s: %s\n", what, strerror(errno));
		exit(1);
	}
	return result;
}

struct machine {
	int kvm, vm, vcpu;
	size_t run_size;
	struct kvm_run *run;
	uint8_t *ram;
};

static inline long set_region(int vm, int slot, uint64_t gpa, void *hva, uint64_t size)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .guest_phys_addr = gpa, .memory_size = size, .userspace_addr = ADDRESS(hva),
	};

	return call(vm, KVM_SET_USER_MEMORY_REGION, &region);
}

static inline void *fresh_ram(size_t size)
{
	void *ram = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	must(ram == MAP_FAILED ? -1 : 0, "mmap of RAM");
	return ram;
}

static inline void start_at(int vcpu, uint64_t rip)
{
	struct kvm_regs regs = { .rip = rip, .rflags = 2, .rsp = 0x8000 };
	struct kvm_sregs sregs;

	must(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs.base = sregs.cs.selector = 0;
	must(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	must(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static inline int add_vcpu(struct machine *m, int id, struct kvm_run **run)
{
	int vcpu = must(ioctl(m->vm, KVM_CREATE_VCPU, id), "KVM_CREATE_VCPU");

	m->run_size = must(ioctl(m->kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	*run = mmap(NULL, m->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	must(*run == MAP_FAILED ? -1 : 0, "mmap of kvm_run");
	return vcpu;
}

/* A VM with `size` bytes of RAM at GPA 0 (`ram`, or private anonymous memory) and a vCPU in real mode at ENTRY. */
static inline void make(struct machine *m, void *ram, size_t size, const void *code, size_t length)
{
	m->kvm = must(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	m->vm = must(ioctl(m->kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	m->ram = ram ? ram : fresh_ram(size);
	memcpy(m->ram + ENTRY, code, length);
	must(number(set_region(m->vm, 0, 0, m->ram, size)) ? -1 : 0, "KVM_SET_USER_MEMORY_REGION");
	m->vcpu = add_vcpu(m, 0, &m->run);
	start_at(m->vcpu, ENTRY);
}

#define GUEST(m, ram, size, code) make(m, ram, size, code, sizeof(code) - 1)

/* KVM_RUN: the exit reason, or -errno. */
static inline long run(struct machine *m)
{
	long result = call(m->vcpu, KVM_RUN, 0);

	return result ? result : m->run->exit_reason;
}

static inline uint8_t io_byte(struct kvm_run *run)
{
	return *((uint8_t *)run + run->io.data_offset);
}

#define SPIN "\xfe\x06\x00\x20\xeb\xfa"		  /* 1: inc byte [0x2000]; jmp 1b */
#define OUT_FOR_EVER "\xb0\x58\xe6\x10\xeb\xfc"	  /* mov al, 'X'; 1: out 0x10, al; jmp 1b */
#define OUT_AND_HLT "\xb0\x58\xe6\x10\xf4"	  /* mov al, 'X'; out 0x10, al; hlt */
#define ADD_AND_TELL "\xa0\x00\x20\x04\x01\xa2\x01\x20\xe6\x10\xeb\xf4" /* 1: al = [0x2000] + 1; [0x2001] = al; out 0x10, al; jmp 1b */
#endif
