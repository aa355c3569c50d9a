/* Wild pointers in every position: NULL, tiny, unmapped, kernel's, the end of the address space, over a page's end, read only.
 * All are EFAULT, but a read-only struct that is only read. Values where pointers are not expected are what they are.
 */
#include "mini.h"

enum { SYSTEM, VM, VCPU };
enum { IN = 1, OUT = 2 };
static const struct { const char *name; int on; unsigned long request; size_t size; int way; } CALLS[] = {
	{ "GET_SUPPORTED_CPUID", SYSTEM, KVM_GET_SUPPORTED_CPUID, sizeof(struct kvm_cpuid2), IN | OUT },
	{ "GET_MSR_INDEX_LIST", SYSTEM, KVM_GET_MSR_INDEX_LIST, sizeof(struct kvm_msr_list), IN | OUT },
	{ "SET_USER_MEMORY_REGION", VM, KVM_SET_USER_MEMORY_REGION, sizeof(struct kvm_userspace_memory_region), IN },
	{ "GET_DIRTY_LOG", VM, KVM_GET_DIRTY_LOG, sizeof(struct kvm_dirty_log), IN },
	{ "ENABLE_CAP", VM, KVM_ENABLE_CAP, sizeof(struct kvm_enable_cap), IN },
	{ "IRQFD", VM, KVM_IRQFD, sizeof(struct kvm_irqfd), IN },
	{ "IOEVENTFD", VM, KVM_IOEVENTFD, sizeof(struct kvm_ioeventfd), IN },
	{ "GET_CLOCK", VM, KVM_GET_CLOCK, sizeof(struct kvm_clock_data), OUT },
	{ "GET_REGS", VCPU, KVM_GET_REGS, sizeof(struct kvm_regs), OUT },
	{ "SET_REGS", VCPU, KVM_SET_REGS, sizeof(struct kvm_regs), IN },
	{ "GET_SREGS", VCPU, KVM_GET_SREGS, sizeof(struct kvm_sregs), OUT },
	{ "SET_SREGS", VCPU, KVM_SET_SREGS, sizeof(struct kvm_sregs), IN },
	{ "GET_FPU", VCPU, KVM_GET_FPU, sizeof(struct kvm_fpu), OUT },
	{ "SET_FPU", VCPU, KVM_SET_FPU, sizeof(struct kvm_fpu), IN },
	{ "GET_MSRS", VCPU, KVM_GET_MSRS, sizeof(struct kvm_msrs), IN | OUT },
	{ "SET_MSRS", VCPU, KVM_SET_MSRS, sizeof(struct kvm_msrs), IN },
	{ "SET_CPUID2", VCPU, KVM_SET_CPUID2, sizeof(struct kvm_cpuid2), IN },
	{ "GET_MP_STATE", VCPU, KVM_GET_MP_STATE, sizeof(struct kvm_mp_state), OUT },
	{ "SET_MP_STATE", VCPU, KVM_SET_MP_STATE, sizeof(struct kvm_mp_state), IN },
	{ "GET_XSAVE", VCPU, KVM_GET_XSAVE, sizeof(struct kvm_xsave), OUT },
	{ "GET_DEBUGREGS", VCPU, KVM_GET_DEBUGREGS, sizeof(struct kvm_debugregs), OUT },
	{ "TRANSLATE", VCPU, KVM_TRANSLATE, sizeof(struct kvm_translation), IN | OUT },
	{ "SET_GUEST_DEBUG", VCPU, KVM_SET_GUEST_DEBUG, sizeof(struct kvm_guest_debug), IN },
};

static uint8_t *pages; /* [0] writable, [1] not mapped, [2] readable, [3] not mapped */

static void ioctls(struct machine *m)
{
	const int fds[] = { m->kvm, m->vm, m->vcpu };
	char what[80];

	for (size_t i = 0; i < sizeof(CALLS) / sizeof(*CALLS); i++) {
		const struct { const char *name; const void *at; } bad[] = {
			{ "NULL", NULL }, { "8", (void *)8 }, { "unmapped", pages + PAGE },
			{ "the kernel's", (void *)0xffff888000000000 }, { "not canonical", (void *)(1UL << 62) },
			{ "the end of user space", (void *)(0x7ffffffff000 - CALLS[i].size / 2) }, { "-1", (void *)-1L },
			{ "the end of all", (void *)(0UL - CALLS[i].size + 1) }, { "over a page's end", pages + PAGE - CALLS[i].size + 1 },
			{ "read only", pages + 2 * PAGE },
		};

		memset(pages, 0, PAGE);
		for (size_t j = 0; j < sizeof(bad) / sizeof(*bad); j++) {
			if (j == 9 && CALLS[i].way != OUT) /* with no entries nothing is written */
				continue;
			snprintf(what, sizeof(what), "%s at %s", CALLS[i].name, bad[j].name);
			expect(what, call(fds[CALLS[i].on], CALLS[i].request, bad[j].at), -EFAULT);
		}
	}
}

static void inside(struct machine *m)
{
	struct kvm_userspace_memory_region region = { .slot = 3, .guest_phys_addr = 8 * MIB, .memory_size = MIB };
	struct { struct kvm_msrs head; struct kvm_msr_entry entry; } *msrs = (void *)(pages + PAGE - sizeof(struct kvm_msrs));
	struct kvm_cpuid2 *cpuid = (void *)(pages + PAGE - sizeof(*cpuid));
	struct kvm_dirty_log log = { .slot = 0, .dirty_bitmap = (void *)8 };

	msrs->head.nmsrs = 1;
	expect("an MSR beyond the page", call(m->vcpu, KVM_GET_MSRS, msrs), -EFAULT);
	msrs->head.nmsrs = 1 << 30;
	expect("very many MSRs", call(m->vcpu, KVM_GET_MSRS, msrs), -E2BIG);
	cpuid->nent = 1;
	expect("a CPUID entry beyond the page", call(m->vcpu, KVM_SET_CPUID2, cpuid), -EFAULT);
	cpuid->nent = ~0U;
	expect("very many CPUID entries", call(m->vcpu, KVM_SET_CPUID2, cpuid), -E2BIG);
	expect("a dirty log that is not kept", call(m->vm, KVM_GET_DIRTY_LOG, &log), -ENOENT);
	region.userspace_addr = 0xffff888000000000;
	expect("RAM of the kernel's", call(m->vm, KVM_SET_USER_MEMORY_REGION, &region), -EINVAL);
	region.userspace_addr = ADDRESS(pages) + 1;
	expect("RAM at an odd address", call(m->vm, KVM_SET_USER_MEMORY_REGION, &region), -EINVAL);
	region.userspace_addr = 0x10000000000;
	expect("RAM where nothing is", call(m->vm, KVM_SET_USER_MEMORY_REGION, &region), 0);
	region.slot = 4, region.guest_phys_addr = 16 * MIB, region.memory_size = PAGE, region.userspace_addr = ADDRESS(pages) + 2 * PAGE;
	expect("RAM that is read only", call(m->vm, KVM_SET_USER_MEMORY_REGION, &region), 0);
	region.slot = 0xffff;
	expect("a slot too high", call(m->vm, KVM_SET_USER_MEMORY_REGION, &region), -EINVAL);
}

int main(void)
{
	struct machine m;
	uint8_t *over;

	pages = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	munmap(pages + PAGE, PAGE), munmap(pages + 3 * PAGE, PAGE);
	mprotect(pages + 2 * PAGE, PAGE, PROT_READ);
	GUEST(&m, NULL, 16 * PAGE, OUT_AND_HLT);
	ioctls(&m);
	inside(&m);
	over = fresh_ram(2 * PAGE);
	expect("KVM_GET_REGS over two pages", call(m.vcpu, KVM_GET_REGS, over + PAGE - 20), 0);
	expect("KVM_SET_REGS over two pages", call(m.vcpu, KVM_SET_REGS, over + PAGE - 20), 0);
	expect("KVM_RUN with an argument", call(m.vcpu, KVM_RUN, (void *)1), -EINVAL);
	expect("KVM_GET_API_VERSION with one", call(m.kvm, KVM_GET_API_VERSION, (void *)1), -EINVAL);
	expect("KVM_GET_VCPU_MMAP_SIZE with one", call(m.kvm, KVM_GET_VCPU_MMAP_SIZE, pages), -EINVAL);
	expect("KVM_CREATE_VM of type -1", call(m.kvm, KVM_CREATE_VM, (void *)-1L), -EINVAL);
	expect("KVM_CREATE_VCPU -1", call(m.vm, KVM_CREATE_VCPU, (void *)-1L), -EINVAL);
	expect("KVM_CHECK_EXTENSION -1", call(m.kvm, KVM_CHECK_EXTENSION, (void *)-1L), 0);
	expect("an ioctl that is none", call(m.vm, 0xAEFE, pages), -ENOTTY);
	expect("a VM's on /dev/kvm", call(m.kvm, KVM_SET_USER_MEMORY_REGION, pages), -EINVAL);
	expect("fd -1", call(-1, KVM_RUN, 0), -EBADF);
	expect("fd of 2^31", call(1 << 31, KVM_RUN, 0), -EBADF);
	expect("after all that the guest runs", run(&m), KVM_EXIT_IO);
	return verdict();
}
