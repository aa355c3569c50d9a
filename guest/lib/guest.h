/*
 * What a bundled guest may rely on and call. docs/seams.md section 4 is the
 * contract with the VMM; struct boot_info below is its second half in C.
 *
 * A program defines guest_main(), whose result is the guest's exit code, and
 * may define guest_secondary() for vCPUs other than 0.
 */
#ifndef SEVMM_GUEST_H
#define SEVMM_GUEST_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE_SIZE	4096UL
#define PAGE_2M		0x200000UL

/* Exit codes, as the VMM sees them at the exit port. */
enum {
	EXIT_PASS = 0,
	EXIT_CHECK = 1,			/* a CHECK() failed and said so */
	EXIT_NO_BOOT_INFO = 0x7e,	/* RDI did not point at a boot info page */
	EXIT_EXCEPTION = 0x7f,		/* an exception nobody expected */
};

enum { VM_PLAIN = 0, VM_SW_PROTECTED = 1, VM_SEV = 2, VM_SEV_ES = 3 };

enum {
	FEATURE_MAP_GPA_RANGE = 1 << 0,
	FEATURE_MSR_EXITS = 1 << 1,
	FEATURE_IMPLICIT_CONVERSION = 1 << 2,
	FEATURE_MMIO = 1 << 3,
};

enum {
	PORT_EXIT = 0xf4,
	PORT_ECHO = 0xf8,
	PORT_STAGE = 0xf9,		/* OUT of the stage number, see announce() */
	PORT_CONSOLE = 0x3f8,
};

struct boot_info {
	char magic[8];			/* "SEVMMBI1" */
	uint64_t vm_type;
	uint64_t c_mask;		/* 1 << C-bit, or 0 */
	uint64_t memory_size;		/* bytes */
	uint64_t vcpus;
	uint64_t pml4;
	uint64_t shared_page;
	uint64_t test_area, test_size;
	uint64_t mmio;
	uint64_t features;
	uint64_t msr;
	uint64_t ghcbs;			/* SEV-ES: one page for each vCPU, shared; else 0 */
	uint8_t reserved[256 - 104];
	char arguments[1024];		/* words separated by spaces */
};
_Static_assert(offsetof(struct boot_info, features) == 80, "boot info layout");
_Static_assert(offsetof(struct boot_info, ghcbs) == 96, "boot info layout");
_Static_assert(offsetof(struct boot_info, arguments) == 256, "boot info layout");

/* The registers as vectors.S leaves them on the stack. */
struct frame {
	uint64_t r15, r14, r13, r12, r11, r10, r9, r8;
	uint64_t rdi, rsi, rbp, rbx, rdx, rcx, rax;
	uint64_t vector, error;
	uint64_t rip, cs, rflags, rsp, ss;
};

/* The program's part. */
unsigned guest_main(const struct boot_info *boot, unsigned vcpu);
void guest_secondary(const struct boot_info *boot, unsigned vcpu);

/* entry.c */
_Noreturn void guest_exit(unsigned code);
_Noreturn void guest_halt(void);
bool argument(const struct boot_info *boot, const char *word);
bool argument_value(const struct boot_info *boot, const char *key, uint64_t *value);
const char *argument_text(const struct boot_info *boot, const char *key, size_t *length);
const char *vm_type_name(uint64_t type);
void announce(const struct boot_info *boot, unsigned stage);

/* console.c: %c %s %d %u %x %p, with l or ll; %% */
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));
void console_force_unlock(void);

/* memory.c: also what the compiler may call on its own */
void *memset(void *to, int byte, size_t size);
void *memcpy(void *to, const void *from, size_t size);
int memcmp(const void *left, const void *right, size_t size);
size_t strlen(const char *text);

/* A failed check ends the guest with a sentence; it never goes on. */
#define CHECK(condition, ...)						\
	do {								\
		if (!(condition)) {					\
			print("check failed: " __VA_ARGS__);		\
			print("\n");					\
			guest_exit(EXIT_CHECK);				\
		}							\
	} while (0)

/*
 * Expected exceptions. EXPECT_EXCEPTION runs instructions that should raise
 * `vector` and yields true if they did, filling a struct caught; execution goes
 * on after the last instruction either way. Any other vector stays fatal. The
 * instructions may use RAX, RCX and RDX. For vCPU 0 only.
 */
struct caught {
	uint64_t vector, error, rip, cr2;
	uint64_t resume;		/* the address after the instructions */
};

struct recovery {
	uint64_t resume;		/* 0: not armed */
	uint64_t vector;
	bool taken;
	struct caught caught;
};
extern struct recovery recovery;
bool recovery_disarm(struct caught *caught);

/* NMIs are unexpected exceptions unless wanted: then they are counted, no more. For vCPU 0 only. */
struct nmis {
	bool wanted;
	unsigned count;
};
extern volatile struct nmis nmis;

#define EXPECT_EXCEPTION(number, caught, instructions, ...)		\
	({								\
		recovery.vector = (number);				\
		recovery.taken = false;					\
		asm volatile("movq $1f, %c[resume]\n\t"			\
			     instructions "\n"				\
			     "1:"					\
			     : : [resume] "i" (&recovery.resume), ##__VA_ARGS__ \
			     : "rax", "rcx", "rdx", "memory", "cc");	\
		recovery_disarm(caught);				\
	})

/* Instructions. */
static inline void out8(uint16_t port, uint8_t value)
{
	asm volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline void out16(uint16_t port, uint16_t value)
{
	asm volatile("outw %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline void out32(uint16_t port, uint32_t value)
{
	asm volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline uint8_t in8(uint16_t port)
{
	uint8_t value;

	asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline uint16_t in16(uint16_t port)
{
	uint16_t value;

	asm volatile("inw %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline uint32_t in32(uint16_t port)
{
	uint32_t value;

	asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline uint64_t read_cr2(void)
{
	uint64_t value;

	asm volatile("movq %%cr2, %0" : "=r"(value));
	return value;
}

static inline uint64_t read_cr3(void)
{
	uint64_t value;

	asm volatile("movq %%cr3, %0" : "=r"(value));
	return value;
}

/* Spinlocks: vCPUs may be threads of a host with fewer cores, hence pause. */
typedef volatile int spinlock;

static inline void spin_lock(spinlock *lock)
{
	while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE))
		while (__atomic_load_n(lock, __ATOMIC_RELAXED))
			__builtin_ia32_pause();
}

static inline void spin_unlock(spinlock *lock)
{
	__atomic_store_n(lock, 0, __ATOMIC_RELEASE);
}

#endif
