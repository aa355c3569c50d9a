/* What a program can do to whoever answers it: one behaviour per run, named by the first argument. */
#include "mini.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <sys/resource.h>

#define CHECK(fd) call(fd, KVM_CHECK_EXTENSION, (void *)KVM_CAP_USER_MEMORY)

static struct machine m;

/* An exec that fails changes nothing: the process, its VM and its memory are what they were. */
static int failed_exec(void)
{
	char *none[] = { NULL };

	GUEST(&m, NULL, 16 * PAGE, OUT_FOR_EVER);
	expect("run", run(&m), KVM_EXIT_IO);
	expect("an exec of nothing", number(execve("/there/is/no/such/program", none, none)), -ENOENT);
	expect("the VM afterwards", CHECK(m.vm), 1);
	expect("run", run(&m), KVM_EXIT_IO);
	m.ram[ENTRY + 1] = 'Y';
	start_at(m.vcpu, ENTRY);
	expect("run", run(&m), KVM_EXIT_IO);
	expect("the guest's memory is the program's", io_byte(m.run), 'Y');
	return verdict();
}

/* One that succeeds makes another process of it: the VM that it inherits is a stranger's, and its own are its own. */
static char *vm_fd;

static int heir(void)
{
	expect("the VM of the program that was before", CHECK(atoi(vm_fd)), -EIO);
	GUEST(&m, NULL, 16 * PAGE, OUT_FOR_EVER);
	expect("run", run(&m), KVM_EXIT_IO);
	expect("the guest's memory is the program's", io_byte(m.run), 'X');
	return verdict();
}

static int exec(void)
{
	char text[16], *words[] = { "/proc/self/exe", "heir", text, NULL };

	GUEST(&m, NULL, 16 * PAGE, OUT_FOR_EVER);
	expect("an exec of nothing", number(execve("/there/is/no/such/program", words, environ)), -ENOENT);
	sprintf(text, "%d", m.vm);
	fcntl(m.vm, F_SETFD, 0);
	execve(*words, words, environ);
	return 1;
}

/* The same by the 32-bit system call. */
static int exec32(void)
{
	struct { char path[64], text[16], heir[8]; uint32_t words[4]; } *low;
	long result;

	low = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	GUEST(&m, NULL, 16 * PAGE, OUT_FOR_EVER);
	strcpy(low->path, "/proc/self/exe"), strcpy(low->heir, "heir"), sprintf(low->text, "%d", m.vm);
	low->words[0] = ADDRESS(low->path), low->words[1] = ADDRESS(low->heir), low->words[2] = ADDRESS(low->text);
	fcntl(m.vm, F_SETFD, 0);
	asm volatile("int $0x80" : "=a"(result) : "a"(11), "b"(low->path), "c"(low->words), "d"(0) : "memory", "r8", "r9", "r10", "r11");
	if ((int)result == -ENOSYS)
		unavailable("a kernel that takes 32-bit system calls");
	return 1;
}

/* No more fds: that is what the program hears. */
static int few_fds(void)
{
	struct rlimit limit = { 100, 100 };
	struct mini_guest_memfd one = { .size = PAGE };
	int kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm"), vm = must(ioctl(kvm, KVM_CREATE_VM, 1), "a VM");

	must(setrlimit(RLIMIT_NOFILE, &limit), "setrlimit");
	expect("a guest_memfd", call(vm, MINI_CREATE_GUEST_MEMFD, &one) >= 0, 1);
	for (int i = 0; i < 200; i++)
		dup(0);
	expect("a VM without room", number(ioctl(kvm, KVM_CREATE_VM, 1)), -EMFILE);
	expect("a guest_memfd without room", call(vm, MINI_CREATE_GUEST_MEMFD, &one), -EMFILE);
	expect("the VM", CHECK(vm), 1);
	return verdict();
}

/* More news of closed files than the kernel keeps; that of the last VM is among what it drops. With one ASID. */
static int sev_vm(int kvm)
{
	struct kvm_sev_init { uint64_t features; uint32_t flags; uint16_t version, pad1; uint32_t pad2[8]; } init = { 0 };
	struct { uint32_t id, pad; uint64_t data; uint32_t error, fd; } command = { .id = 22 /* KVM_SEV_INIT2 */ };
	int vm = must(ioctl(kvm, KVM_CREATE_VM, 2), "an SEV VM");
	long result;

	command.data = ADDRESS(&init), command.fd = open("/dev/sev", O_RDWR);
	result = call(vm, KVM_MEMORY_ENCRYPT_OP, &command);
	close(command.fd);
	return result ? result : vm;
}

static int storm(void)
{
	int kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm"), one, two, vm, vcpu;
	char names[2][16];

	vm = sev_vm(kvm);
	expect("the only ASID is used", vm > 0, 1);
	vcpu = must(ioctl(vm, KVM_CREATE_VCPU, 0), "a vCPU");
	expect("there is no other", sev_vm(kvm), -EBUSY);
	one = must(open("/dev/kvm", O_RDWR), "/dev/kvm"), two = must(open("/dev/kvm", O_RDWR), "/dev/kvm");
	sprintf(names[0], "%d", one), sprintf(names[1], "%d", two);
	must(chdir("/proc/self/fd"), "chdir");
	for (int i = 0; i < 17000; i++)
		close(open(names[i % 2], O_RDWR)); /* by such a name they are opened anew */
	close(vcpu), close(vm);
	vm = sev_vm(kvm);
	expect("the ASID is free again", vm > 0, 1);
	expect("the VM", CHECK(vm), 1);
	expect("one that was open all the time", CHECK(kvm), 1);
	return verdict();
}

/* The argument of the ioctl stands in memory that one thread takes away and another one brings back, while RAM becomes shared.
 * `lazy` brings it once, and then never again.
 */
static int faulting, lazy;
static char *page;
static struct kvm_userspace_memory_region region;

static void *dropper(void *nothing)
{
	for (;;)
		madvise(page, PAGE, MADV_DONTNEED);
}

static void *bringer(void *nothing)
{
	static char source[PAGE] __attribute__((aligned(PAGE)));
	struct uffdio_copy copy = { .dst = ADDRESS(page), .src = ADDRESS(source), .len = PAGE };
	struct uffd_msg message;

	for (int i = 0; read(faulting, &message, sizeof(message)) > 0; i++) {
		memcpy(source, &region, sizeof(region));
		if (!lazy || !i)
			ioctl(faulting, UFFDIO_COPY, &copy);
	}
	return NULL;
}

static int faults(void)
{
	struct uffdio_register range = { .mode = UFFDIO_REGISTER_MODE_MISSING, .range.len = PAGE };
	struct uffdio_api api = { .api = UFFD_API };
	int kvm, vm, bad = 0;
	pthread_t thread;

	faulting = syscall(SYS_userfaultfd, O_CLOEXEC);
	if (faulting < 0)
		unavailable("userfaultfd for faults in the kernel");
	must(ioctl(faulting, UFFDIO_API, &api), "UFFDIO_API");
	page = fresh_ram(PAGE), range.range.start = ADDRESS(page);
	must(ioctl(faulting, UFFDIO_REGISTER, &range), "UFFDIO_REGISTER");
	pthread_create(&thread, NULL, bringer, NULL);
	kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm"), vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "a VM");
	pthread_create(&thread, NULL, dropper, NULL);
	for (int i = 0; i < 60; i++) {
		char *ram = fresh_ram(16 * PAGE);

		*ram = 1;
		region = (struct kvm_userspace_memory_region){ i, 0, i * MIB, 16 * PAGE, ADDRESS(ram) };
		bad += call(vm, KVM_SET_USER_MEMORY_REGION, page) != 0;
	}
	expect("slots that were refused", bad, 0);
	return verdict();
}

static int never(void)
{
	lazy = 1;
	return faults();
}

/* A filter of the program's own traps mmap, by which its memory would become shared: it sees nothing of that. */
static int trapped;

static void on_trap(int number)
{
	trapped++;
}

static int open_fds(void)
{
	int count = 0;

	for (int fd = 0; fd < 200; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}

static int own_filter(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mmap, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog filter = { 4, code };
	char *more = fresh_ram(4 * PAGE);
	int before;

	GUEST(&m, mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), 16 * PAGE, OUT_FOR_EVER);
	signal(SIGSYS, on_trap);
	must(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &filter), "seccomp");
	before = open_fds();
	for (int i = 1; i < 4; i++)
		expect("a slot of private memory", set_region(m.vm, i, i * MIB, more + i * PAGE, PAGE), 0);
	expect("new fds", open_fds() - before, 0);
	expect("signals", trapped, 0);
	syscall(SYS_mmap, 0, PAGE, 0, 0, -1, 0);
	expect("signals of a call of its own", trapped, 1);
	expect("run", run(&m), KVM_EXIT_IO);
	return verdict();
}

/* The whole stack becomes RAM. It grows afterwards as before. */
static long deep(int left)
{
	volatile char frame[PAGE];

	frame[0] = left;
	return left ? deep(left - 1) + frame[0] - (char)left : 0;
}

static int stack(void)
{
	FILE *maps = fopen("/proc/self/maps", "r");
	unsigned long start, end = 0;
	char line[300];
	int vm = must(ioctl(must(open("/dev/kvm", O_RDWR), "/dev/kvm"), KVM_CREATE_VM, 0), "a VM");

	while (!end && fgets(line, sizeof(line), maps))
		if (strstr(line, "[stack]"))
			sscanf(line, "%lx-%lx", &start, &end);
	fclose(maps);
	expect("all of the stack in a slot", set_region(vm, 0, 0, (void *)start, end - start), 0);
	expect("calls that go deep", deep(500), 0);
	expect("its lowest page alone", set_region(vm, 1, MIB, (void *)start, PAGE), 0);
	expect("calls that go deeper", deep(1000), 0);
	return verdict();
}

/* Children by vfork(2) come and go while memory becomes shared: they wait for the same thread of the supervisor as the conversion. */
static volatile int ended;

static void *bear(void *nothing)
{
	while (!ended) {
		int child = vfork();

		if (!child) {
			execl("/bin/true", "true", NULL);
			_exit(1);
		}
		waitpid(child, NULL, 0);
	}
	return NULL;
}

static int vforks(void)
{
	struct timespec began, now;
	pthread_t threads[2];
	long slowest = 0;
	int bad = 0, vm;

	vm = must(ioctl(must(open("/dev/kvm", O_RDWR), "/dev/kvm"), KVM_CREATE_VM, 0), "a VM");
	for (int i = 0; i < 2; i++)
		pthread_create(&threads[i], NULL, bear, NULL);
	for (int i = 0; i < 150; i++) {
		clock_gettime(CLOCK_MONOTONIC, &began);
		bad += set_region(vm, i, i * MIB, fresh_ram(16 * PAGE), 16 * PAGE) != 0;
		clock_gettime(CLOCK_MONOTONIC, &now);
		if ((now.tv_sec - began.tv_sec) * 1000 + (now.tv_nsec - began.tv_nsec) / 1000000 > slowest)
			slowest = (now.tv_sec - began.tv_sec) * 1000 + (now.tv_nsec - began.tv_nsec) / 1000000;
	}
	ended = 1;
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	expect("slots that were refused", bad, 0);
	printf("slowest: %ld ms\n", slowest);
	expect("none took longer than 1.5 s", slowest < 1500, 1);
	return verdict();
}

/* RAM in a file on which the program has a lease: who opens it for writing would have to wait until that is given up. */
static int lease(void)
{
	struct kvm_userspace_memory_region slot = { .flags = KVM_MEM_READONLY, .memory_size = 16 * PAGE };
	int memfd = must(memfd_create("ram", 0), "memfd_create"), file;
	char path[40];
	void *ram;

	must(ftruncate(memfd, 16 * PAGE), "ftruncate");
	must(pwrite(memfd, OUT_FOR_EVER, sizeof(OUT_FOR_EVER) - 1, ENTRY), "pwrite");
	sprintf(path, "/proc/self/fd/%d", memfd);
	file = must(open(path, O_RDONLY), path);
	close(memfd);
	signal(SIGIO, SIG_IGN);
	must(fcntl(file, F_SETLEASE, F_RDLCK), "a lease");
	ram = mmap(NULL, 16 * PAGE, PROT_READ, MAP_SHARED, file, 0);
	slot.userspace_addr = ADDRESS(ram);
	m.kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm"), m.vm = must(ioctl(m.kvm, KVM_CREATE_VM, 0), "a VM");
	expect("a slot", call(m.vm, KVM_SET_USER_MEMORY_REGION, &slot), 0);
	m.vcpu = add_vcpu(&m, 0, &m.run);
	start_at(m.vcpu, ENTRY);
	expect("run", run(&m), KVM_EXIT_IO);
	return verdict();
}

int main(int count, char **words)
{
	static const struct { const char *name; int (*does)(void); } all[] = {
		{ "failed-exec", failed_exec }, { "exec", exec }, { "exec32", exec32 }, { "heir", heir }, { "few-fds", few_fds },
		{ "storm", storm }, { "faults", faults }, { "never", never }, { "lease", lease }, { "stack", stack }, { "vforks", vforks }, { "own-filter", own_filter },
	};

	vm_fd = words[count - 1];
	for (unsigned i = 0; count > 1 && i < sizeof(all) / sizeof(*all); i++)
		if (!strcmp(words[1], all[i].name))
			return all[i].does();
	return 2;
}
