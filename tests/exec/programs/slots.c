/* Very many slots of one page, each a mapping of its own that was made just before: the guest adds one to the first byte of
 * every page. Then a slot in the middle is deleted, and made again of other memory.
 */
#include "mini.h"

#define MANY 1200
#define BASE 0x100000UL
#define MIDDLE (MANY / 2)
#define INCREMENT "\xfe\x03\x81\xc3\x00\x10\x00\x00\x49\x75\xf5\xf4" /* 1: inc byte [ebx]; add ebx, 4096; dec ecx; jnz 1b; hlt */

static struct machine m;
static uint8_t *pages[MANY];

static uint8_t *page_of(int value)
{
	uint8_t *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	page[0] = value;
	return page;
}

static long over(int first, int count)
{
	struct kvm_regs regs = { .rip = ENTRY, .rflags = 2, .rbx = BASE + first * PAGE, .rcx = count };

	must(ioctl(m.vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
	return run(&m);
}

static int other_than(int added)
{
	int wrong = 0;

	for (int i = 0; i < MANY; i++)
		wrong += pages[i][0] != (uint8_t)(i + added);
	return wrong;
}

int main(void)
{
	struct kvm_segment code = { .limit = ~0u, .selector = 8, .type = 11, .present = 1, .s = 1, .db = 1, .g = 1 };
	struct kvm_segment data = code;
	struct kvm_sregs sregs;

	GUEST(&m, NULL, 16 * PAGE, INCREMENT);
	for (int i = 0; i < MANY; i++) {
		pages[i] = page_of(i);
		must(set_region(m.vm, i + 1, BASE + i * PAGE, pages[i], PAGE), "a slot");
	}
	must(ioctl(m.vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	data.type = 3;
	data.selector = 16;
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = data;
	sregs.cr0 |= 1;
	must(ioctl(m.vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");

	expect("the guest", over(0, MANY), KVM_EXIT_HLT);
	expect("pages that it did not reach", other_than(1), 0);
	expect("a slot is deleted", set_region(m.vm, MIDDLE + 1, BASE + MIDDLE * PAGE, pages[MIDDLE], 0), 0);
	expect("  the guest", over(MIDDLE - 1, 3), KVM_EXIT_MMIO);
	expect("  at", m.run->mmio.phys_addr, BASE + MIDDLE * PAGE);
	expect("  and its store", run(&m), KVM_EXIT_MMIO);
	pages[MIDDLE - 1][0]--;
	munmap(pages[MIDDLE], PAGE);
	pages[MIDDLE] = page_of(MIDDLE);
	expect("it is made again", set_region(m.vm, MIDDLE + 1, BASE + MIDDLE * PAGE, pages[MIDDLE], PAGE), 0);
	expect("  the guest", over(MIDDLE, 1), KVM_EXIT_HLT);
	expect("  pages that are not as they should be", other_than(1), 0);
	return verdict();
}
