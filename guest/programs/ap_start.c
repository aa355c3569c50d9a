/*
 * ap-start: vCPUs of an SEV-ES guest start by IPI, and come back from a reset hold.
 *
 * Nobody can give an SEV-ES vCPU registers once it was launched. So the first
 * startup IPI lets it run as its VMSA was measured, whatever the vector says; a
 * vCPU that is to be started again says so itself (AP reset hold) and takes the
 * next startup IPI as an answer, with the place to go on at in a table of the
 * guest's, whose address the host keeps.
 *
 * 1. vCPU 0 turns its APIC to x2APIC mode and sets the AP jump table.
 * 2. It checks that no other vCPU has run.
 * 3. It starts the others; each notes that it runs, and holds: even ones through
 *    the GHCB page, odd ones through the GHCB MSR.
 * 4. It starts them again; each asks for the table, checks that it is the one
 *    that was set, and goes on at the address in it.
 *
 * An IPI that comes before the vCPU holds is lost, so INIT and startup IPI are sent
 * until the vCPU has noted it. One too many ends the hold early: no harm.
 */
#include "ghcb.h"

#define MSR_APIC_BASE		0x1b
#define APIC_X2_ENABLE		(3UL << 10)
#define MSR_X2APIC_SPURIOUS	0x80f
#define APIC_ENABLE		(1UL << 8)
#define MSR_X2APIC_ICR		0x830
#define ICR_INIT		0x4500UL
#define ICR_STARTUP		0x4600UL
#define PATIENCE		4000
#define MAX_VCPUS		64

static struct {
	void (*go_on)(unsigned vcpu);
} table __attribute__((aligned(PAGE_SIZE)));

static bool started[MAX_VCPUS], resumed[MAX_VCPUS];

static uint64_t read_msr(uint32_t msr)
{
	uint32_t low, high;

	asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
	return (uint64_t)high << 32 | low;
}

static void write_msr(uint32_t msr, uint64_t value)
{
	asm volatile("wrmsr" : : "c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)) : "memory");
}

static void go_on(unsigned vcpu)
{
	print("ap-start: vCPU %u came back from its hold (%s)\n", vcpu, vcpu & 1 ? "MSR" : "page");
	__atomic_store_n(&resumed[vcpu], true, __ATOMIC_RELEASE);
}

void guest_secondary(const struct boot_info *boot, unsigned vcpu)
{
	uint64_t at;

	(void)boot;
	print("ap-start: vCPU %u started\n", vcpu);
	__atomic_store_n(&started[vcpu], true, __ATOMIC_RELEASE);
	while ((vcpu & 1 ? ghcb_reset_hold_msr() : ghcb_reset_hold()) == 0)
		;	/* something else woke it */
	at = ghcb_jump_table();
	CHECK(at == (uint64_t)&table, "the host says that the AP jump table is at 0x%lx, not 0x%lx", at, (uint64_t)&table);
	table.go_on(vcpu);
}

/* INIT and startup IPI to `vcpu` until it has noted that it came. */
static void start(unsigned vcpu, const bool *noted)
{
	while (!__atomic_load_n(&noted[vcpu], __ATOMIC_ACQUIRE)) {
		write_msr(MSR_X2APIC_ICR, (uint64_t)vcpu << 32 | ICR_INIT);
		write_msr(MSR_X2APIC_ICR, (uint64_t)vcpu << 32 | ICR_STARTUP);
		for (unsigned i = 0; i < PATIENCE && !__atomic_load_n(&noted[vcpu], __ATOMIC_ACQUIRE); i++)
			__builtin_ia32_pause();
	}
}

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	(void)vcpu;
	CHECK(boot->vm_type == VM_SEV_ES, "only an SEV-ES guest has a reset hold");
	write_msr(MSR_APIC_BASE, read_msr(MSR_APIC_BASE) | APIC_X2_ENABLE);
	write_msr(MSR_X2APIC_SPURIOUS, APIC_ENABLE | 0xff);
	table.go_on = go_on;
	ghcb_set_jump_table((uint64_t)&table);

	for (unsigned i = 0; i < PATIENCE; i++)
		__builtin_ia32_pause();
	for (unsigned i = 1; i < boot->vcpus; i++)
		CHECK(!__atomic_load_n(&started[i], __ATOMIC_ACQUIRE), "vCPU %u runs and nobody started it", i);
	for (unsigned i = 1; i < boot->vcpus; i++)
		start(i, started);
	for (unsigned i = 1; i < boot->vcpus; i++)
		start(i, resumed);
	print("ap-start: %lu vCPUs started and came back\n", boot->vcpus - 1);
	return EXIT_PASS;
}
