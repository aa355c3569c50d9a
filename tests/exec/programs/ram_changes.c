/* What happens to guest RAM while it is a guest's, named by the argument: its file is "cut" off, it is protected ("protect")
 * or unmapped ("unmap") under a running guest, it consists of several mappings with a hole ("gap"), a "child" inherits it,
 * or a mapping of it is "moved" to another place that a second slot uses.
 */
#include "mini.h"

#define SIZE (16 * PAGE)
#define MOV_FROM_HIGH "\xa0\x00\x50\xe6\x10\xa2\x00\x60\xe6\x11\xa2\x00\x70\xf4" /* al = [0x5000]; out 0x10; [0x6000] = al; out 0x11; [0x7000] = al; hlt */

static struct machine m;
static int fd;

static void nothing(int number)
{
}

static void *change(void *how)
{
	volatile uint8_t *progress = m.ram + 0x2000;

	while (!*progress)
		usleep(1000);
	if (!strcmp(how, "cut"))
		ftruncate(fd, 0x2000);
	else if (!strcmp(how, "protect"))
		mprotect(m.ram + 0x2000, PAGE, PROT_READ);
	else
		munmap(m.ram + 0x2000, PAGE);
	return NULL;
}

static void *kick(void *thread)
{
	sleep(2);
	pthread_kill(*(pthread_t *)thread, SIGUSR1);
	return NULL;
}

static void under_a_guest(const char *how)
{
	struct sigaction action = { .sa_handler = nothing };
	pthread_t me = pthread_self(), thread;
	uint8_t *ram;
	long result;

	sigaction(SIGUSR1, &action, NULL);
	fd = memfd_create("ram", 0);
	must(ftruncate(fd, SIZE), "ftruncate");
	ram = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, strcmp(how, "cut") ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, strcmp(how, "cut") ? -1 : fd, 0);
	GUEST(&m, ram, SIZE, SPIN);
	pthread_create(&thread, NULL, change, (void *)how);
	pthread_create(&thread, NULL, kick, &me);
	result = run(&m);
	if (strcmp(how, "cut"))
		expect("the guest cannot go on", result, -EFAULT);
	else
		expect("the guest cannot go on, or is interrupted", result == -EFAULT || result == -EINTR, 1);
	expect("another VM works", call(m.kvm, KVM_CREATE_VM, 0) >= 0, 1);
}

static char mode_of(void *address)
{
	unsigned long start, end, found = 0;
	char line[512], mode[8], writable = '?';
	FILE *maps = fopen("/proc/self/maps", "r");

	while (fgets(line, sizeof(line), maps))
		if (sscanf(line, "%lx-%lx %7s", &start, &end, mode) == 3 && start <= ADDRESS(address) && ADDRESS(address) < end)
			writable = mode[1] == 'w' ? 'w' : mode[0];
	fclose(maps);
	return writable;
}

static void gap(void)
{
	uint8_t *ram = fresh_ram(SIZE);

	ram[0x5000] = 77, ram[0xa000] = 78;
	mprotect(ram + 0x5000, PAGE, PROT_READ);
	mprotect(ram + 0xa000, PAGE, PROT_NONE);
	munmap(ram + 0x7000, PAGE);
	munmap(ram + 0xc000, PAGE);
	GUEST(&m, ram, SIZE, MOV_FROM_HIGH);
	expect("read-only memory is read", run(&m), KVM_EXIT_IO);
	expect("  what is there", io_byte(m.run), 77);
	expect("memory behind it is written", run(&m), KVM_EXIT_IO);
	expect("  what is there then", ram[0x6000], 77);
	expect("nothing is where nothing is mapped", run(&m), -EFAULT);
	expect("the protection is what it was: first", mode_of(ram), 'w');
	expect("  read only", mode_of(ram + 0x5000), 'r');
	expect("  none", mode_of(ram + 0xa000), '-');
	mprotect(ram + 0xa000, PAGE, PROT_READ | PROT_WRITE);
	expect("  its contents", ram[0xa000], 78);
}

static void child(void)
{
	int status;

	GUEST(&m, NULL, SIZE, ADD_AND_TELL);
	m.ram[0x2000] = 1;
	expect("the parent's guest", run(&m), KVM_EXIT_IO);
	if (!fork()) {
		struct machine own;

		expect("inherited memory", m.ram[0x2001], 2);
		GUEST(&own, m.ram, SIZE, ADD_AND_TELL);
		own.ram[0x2000] = 8;
		expect("a child's guest on it", run(&own), KVM_EXIT_IO);
		expect("  what it wrote", own.ram[0x2001], 9);
		exit(failures);
	}
	wait(&status);
	expect("the child's status", status, 0);
	m.ram[0x2000] = 20;
	run(&m);
	expect("the parent's guest afterwards", m.ram[0x2001], 21);
}

static void moved(void)
{
	uint8_t *ram = fresh_ram(SIZE), *there;
	struct machine other;

	GUEST(&m, ram, SIZE, ADD_AND_TELL);
	there = mremap(ram, SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, ram + 64 * MIB);
	must(mmap(ram, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED ? -1 : 0, "mmap");
	memset(ram, 0, SIZE);
	GUEST(&other, ram, SIZE, ADD_AND_TELL); /* a second generation at the same address */
	there[0x2000] = 3, ram[0x2000] = 30;
	expect("a guest on the new memory", run(&other), KVM_EXIT_IO);
	expect("  reads and writes it", ram[0x2001], 31);
	expect("the moved memory is untouched", there[0x2000] + there[0x2001], 3);
	set_region(m.vm, 0, 0, ram, 0);
	expect("a slot on the moved memory", set_region(m.vm, 0, 0, there, SIZE), 0);
	expect("  runs", run(&m), KVM_EXIT_IO);
	expect("  reads and writes it", there[0x2001], 4);
	expect("  and nothing else", ram[0x2001], 31);
}

int main(int argc, char **argv)
{
	const char *how = argc > 1 ? argv[1] : "";

	if (!strcmp(how, "gap"))
		gap();
	else if (!strcmp(how, "child"))
		child();
	else if (!strcmp(how, "moved"))
		moved();
	else
		under_a_guest(how);
	return verdict();
}
