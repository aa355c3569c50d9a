/* What a program can do to whoever answers it: one behaviour per run, named by the first argument. */
#include "mini.h"
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

/* No more fds: that is what the program hears. */
static int few_fds(void)
{
	struct rlimit limit = { 100, 100 };
	struct mini_guest_memfd one = { .size = PAGE };
	int kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm"), vm = must(ioctl(kvm, KVM_CREATE_VM, 1), "a VM");

	must(setrlimit(RLIMIT_NOFILE, &limit), "setrlimit");
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

/* Guest RAM whose pages only the program itself can bring: it is not waited for while it is held. */
static int faults(void)
{
	int memory = memfd_create("slow", 0), fd = syscall(SYS_userfaultfd, O_CLOEXEC);
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	void *ram;
	int kvm, vm;

	if (fd < 0)
		unavailable("userfaultfd");
	must(ftruncate(memory, 16 * PAGE), "ftruncate");
	ram = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, memory, 0);
	must(ioctl(fd, UFFDIO_API, &api), "UFFDIO_API");
	range.range.start = ADDRESS(ram), range.range.len = 16 * PAGE;
	must(ioctl(fd, UFFDIO_REGISTER, &range), "UFFDIO_REGISTER");
	kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm"), vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "a VM");
	expect("a slot", set_region(vm, 0, 0, ram, 16 * PAGE), 0);
	expect("the VM", CHECK(vm), 1);
	return verdict();
}

int main(int count, char **words)
{
	static const struct { const char *name; int (*does)(void); } all[] = {
		{ "failed-exec", failed_exec }, { "exec", exec }, { "heir", heir }, { "few-fds", few_fds },
		{ "storm", storm }, { "faults", faults },
	};

	vm_fd = words[count - 1];
	for (unsigned i = 0; count > 1 && i < sizeof(all) / sizeof(*all); i++)
		if (!strcmp(words[1], all[i].name))
			return all[i].does();
	return 2;
}
