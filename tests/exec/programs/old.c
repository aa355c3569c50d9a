/* System calls that are not x86-64's: int 0x80 and x32 numbers. They either do what they do natively, or fail; but they are
 * no way around the supervisor and no harm to the program. Output: one line each.
 */
#include "mini.h"

static long int80(long nr, long a, long b, long c)
{
	long result;

	asm volatile("int $0x80" : "=a"(result) : "a"(nr), "b"(a), "c"(b), "d"(c) : "memory", "r8", "r9", "r10", "r11");
	return (int)result;
}

static long x32(long nr, long a, long b, long c)
{
	long result;

	asm volatile("syscall" : "=a"(result) : "a"(nr | 0x40000000), "D"(a), "S"(b), "d"(c) : "memory", "rcx", "r11");
	return result;
}

int main(void)
{
	char *low = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	struct machine m;
	long pid, fd, result;

	strcpy(low, "/dev/kvm");
	GUEST(&m, NULL, 16 * PAGE, OUT_FOR_EVER);
	pid = int80(20, 0, 0, 0);
	expect("getpid by int 0x80 is ours or an error", pid == getpid() || (pid < 0 && pid > -4096), 1);
	fd = int80(5, ADDRESS(low), O_RDWR, 0);
	result = fd < 0 ? fd : int80(54, fd, KVM_GET_API_VERSION, 0);
	expect("/dev/kvm by int 0x80 is KVM or an error", result == 12 || (fd < 0 && fd > -4096), 1);
	result = int80(54, m.vcpu, KVM_RUN, 0);
	expect("KVM_RUN by int 0x80 runs or is an error", result == 0 || (result < 0 && result > -4096), 1);
	expect("a file by int 0x80 ends it", int80(6, 99, 0, 0) < 0, 1);
	fd = x32(2, ADDRESS(low), O_RDWR, 0);
	result = fd < 0 ? fd : x32(514, fd, KVM_GET_API_VERSION, 0);
	expect("/dev/kvm by x32 is KVM or an error", result == 12 || (fd < 0 && fd > -4096), 1);
	expect("and the guest runs", run(&m), KVM_EXIT_IO);
	return verdict();
}
