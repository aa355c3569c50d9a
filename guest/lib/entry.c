/*
 * From the entry point to the program, and out again.
 *
 * 1. Every vCPU arrives here from start.S with the boot info and its index.
 * 2. The magic is checked before anything else in the page is believed.
 * 3. On SEV-ES each vCPU gives the host its GHCB page, without which there is no
 *    console and no exit: who has none ends with a termination request.
 * 4. vCPU 0 runs guest_main() and leaves through the exit port with its result;
 *    the others run guest_secondary() and return to halt in start.S.
 */
#include "ghcb.h"

void guest_entry(const struct boot_info *boot, unsigned vcpu);

void guest_exit(unsigned code)
{
	out32(PORT_EXIT, code);
	guest_halt();	/* the VMM ends the VM at the exit port; if not, stay put */
}

__attribute__((weak)) void guest_secondary(const struct boot_info *boot, unsigned vcpu)
{
	(void)boot;
	(void)vcpu;
}

void guest_entry(const struct boot_info *boot, unsigned vcpu)
{
	if (memcmp(boot->magic, "SEVMMBI1", sizeof(boot->magic)) != 0) {
		print("guest: no boot info at %p\n", (const void *)boot);
		guest_exit(EXIT_NO_BOOT_INFO);
	}
	if (boot->vm_type == VM_SEV_ES)
		ghcb_start(boot, vcpu);
	if (vcpu == 0)
		guest_exit(guest_main(boot, vcpu));
	guest_secondary(boot, vcpu);
}

/* Finds a word that is `key`, or begins with `key=`; NULL if there is none. */
static const char *find(const struct boot_info *boot, const char *key)
{
	const char *end = boot->arguments + sizeof(boot->arguments);
	size_t length = strlen(key);

	for (const char *at = boot->arguments; at < end && *at;) {
		if ((size_t)(end - at) > length && memcmp(at, key, length) == 0 &&
		    (at[length] == '\0' || at[length] == ' ' || at[length] == '='))
			return at + length;
		while (at < end && *at && *at != ' ')
			at++;
		while (at < end && *at == ' ')
			at++;
	}
	return NULL;
}

bool argument(const struct boot_info *boot, const char *word)
{
	return find(boot, word) != NULL;
}

/* key=N, decimal or 0x hexadecimal; false where the key or its number is missing. */
bool argument_value(const struct boot_info *boot, const char *key, uint64_t *value)
{
	const char *at = find(boot, key);
	unsigned base = 10, digits = 0;
	uint64_t sum = 0;

	if (!at || *at++ != '=')
		return false;
	if (at[0] == '0' && at[1] == 'x') {
		base = 16;
		at += 2;
	}
	for (;; at++, digits++) {
		unsigned digit;

		if (*at >= '0' && *at <= '9')
			digit = *at - '0';
		else if (base == 16 && *at >= 'a' && *at <= 'f')
			digit = *at - 'a' + 10;
		else
			break;
		sum = sum * base + digit;
	}
	*value = sum;
	return digits != 0;
}

/* key=TEXT, up to the next space; NULL where the key is missing or has no value. Not NUL-terminated. */
const char *argument_text(const struct boot_info *boot, const char *key, size_t *length)
{
	const char *end = boot->arguments + sizeof(boot->arguments);
	const char *at = find(boot, key), *stop;

	if (!at || *at++ != '=')
		return NULL;
	for (stop = at; stop < end && *stop && *stop != ' '; stop++)
		;
	*length = stop - at;
	return at;
}

const char *vm_type_name(uint64_t type)
{
	static const char *const names[] = { "plain", "sw-protected", "sev", "sev-es" };

	return type < sizeof(names) / sizeof(names[0]) ? names[type] : "unknown";
}

/*
 * Tells the host how far a program has come: the stage is in the first u64 of
 * the shared page when the byte arrives at the stage port. A VMM that does not
 * care ignores the port; a test looks into guest memory at that moment.
 */
void announce(const struct boot_info *boot, unsigned stage)
{
	*(volatile uint64_t *)boot->shared_page = stage;
	out8(PORT_STAGE, stage);
}
