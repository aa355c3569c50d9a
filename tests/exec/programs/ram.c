/* Guest RAM of the backing named by the argument: coherent both ways, before and after madvise, mremap and a second VM. */
#include "mini.h"
#include <sys/vfs.h>

#define SIZE (2 * MIB)

static void *backed(const char *kind)
{
	int flags = MAP_SHARED, fd = -1;
	void *ram;

	if (!strcmp(kind, "private"))
		flags = MAP_PRIVATE | MAP_ANONYMOUS;
	else if (!strcmp(kind, "shared"))
		flags = MAP_SHARED | MAP_ANONYMOUS;
	else if (!strcmp(kind, "hugetlb"))
		flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB;
	else if (!strcmp(kind, "hugetlb-memfd"))
		fd = memfd_create(kind, MFD_HUGETLB);
	else if (!strncmp(kind, "memfd", 5))
		fd = memfd_create(kind, 0);
	else
		fd = must(open("ram.bin", O_RDWR | O_CREAT | O_TRUNC, 0600), "ram.bin");
	if (strstr(kind, "file-private"))
		flags = MAP_PRIVATE;
	if (fd >= 0)
		must(ftruncate(fd, SIZE), "ftruncate");
	ram = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (ram == MAP_FAILED && strstr(kind, "hugetlb"))
		unavailable("huge pages");
	must(ram == MAP_FAILED ? -1 : 0, kind);
	if (strstr(kind, "closed"))
		close(fd);
	return ram;
}

static void try(struct machine *m, const char *what, int seed)
{
	m->ram[0x2000] = seed;
	m->ram[0x2001] = 0;
	expect(what, run(m), KVM_EXIT_IO);
	expect("  the guest read", io_byte(m->run), seed + 1);
	expect("  the guest wrote", m->ram[0x2001], seed + 1);
}

int main(int argc, char **argv)
{
	const char *kind = argc > 1 ? argv[1] : "private";
	uint8_t *ram = backed(kind), *moved;
	int private = !strcmp(kind, "private"), huge = strstr(kind, "hugetlb") != NULL;
	struct machine m, other;

	strcpy((char *)ram + 0x5000, "written before");
	GUEST(&m, ram, SIZE, ADD_AND_TELL);
	expect("contents kept", strcmp((char *)ram + 0x5000, "written before"), 0);
	try(&m, "first", 1);
	try(&m, "second", 41);
	GUEST(&other, ram, SIZE, ADD_AND_TELL);
	try(&other, "a second VM on the same memory", 7);
	try(&m, "the first again", 9);
	if (!huge) {
		expect("mprotect to read only", mprotect(ram + 0x6000, PAGE, PROT_READ), 0);
		expect("  and back", mprotect(ram + 0x6000, PAGE, PROT_READ | PROT_WRITE), 0);
		ram[0x6000] = 5;
	}
	ram[0x7000] = 6;
	if (!huge) {
		expect("MADV_DONTNEED", madvise(ram + 0x7000, PAGE, MADV_DONTNEED), 0);
		expect("  what is there then", ram[0x7000], private || strstr(kind, "file-private") ? 0 : 6);
		expect("MADV_DONTNEED of the guest's code", madvise(ram + ENTRY, PAGE, MADV_DONTNEED), 0);
		memcpy(ram + ENTRY, ADD_AND_TELL, sizeof(ADD_AND_TELL));
		try(&m, "after it", 70);
		expect("a bad madvise", number(madvise(ram + 1, PAGE, MADV_DONTNEED)), -EINVAL);
		moved = mremap(ram, SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, ram + 64 * MIB);
		expect("mremap", moved == ram + 64 * MIB, 1);
		expect("  contents", moved[0x2001], 71);
		expect("  the old addresses are none", run(&m) == KVM_EXIT_IO, 0); /* EFAULT, or an error exit where KVM emulates */
		m.ram = moved;
		expect("a slot is deleted", set_region(m.vm, 0, 0, moved, 0), 0);
		expect("  and made again", set_region(m.vm, 0, 0, moved, SIZE), 0);
		start_at(m.vcpu, ENTRY);
		try(&m, "at the new addresses", 100);
		ram = moved;
	}
	close(m.vcpu), munmap(m.run, m.run_size), close(m.vm);
	ram[0x2000] = 3;
	expect("memory after the VM", ram[0x2000], 3);
	expect("munmap", munmap(ram, SIZE), 0);
	return verdict();
}
