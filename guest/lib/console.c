/*
 * Text to the console port, one byte OUT per character.
 *
 * String instructions would need fewer exits, but an SEV host cannot read the
 * encrypted buffer of a rep outsb, so even Linux unrolls them there. A print()
 * is one critical section: lines of several vCPUs do not mix.
 */
#include "guest.h"

static spinlock lock;

/* For the exception handler, whose own vCPU may hold the lock. */
void console_force_unlock(void)
{
	spin_unlock(&lock);
}

static void put(char c)
{
	out8(PORT_CONSOLE, c);
}

static void put_string(const char *text)
{
	for (; *text; text++)
		put(*text);
}

static void put_number(uint64_t value, unsigned base)
{
	char digits[24];
	unsigned n = 0;

	do {
		digits[n++] = "0123456789abcdef"[value % base];
		value /= base;
	} while (value);
	while (n)
		put(digits[--n]);
}

void print(const char *format, ...)
{
	va_list list;

	va_start(list, format);
	spin_lock(&lock);
	for (; *format; format++) {
		bool wide = false;
		uint64_t value;

		if (*format != '%') {
			put(*format);
			continue;
		}
		while (*++format == 'l')
			wide = true;
		switch (*format) {
		case 'c':
			put(va_arg(list, int));
			break;
		case 's':
			put_string(va_arg(list, const char *));
			break;
		case 'd': {
			int64_t number = wide ? va_arg(list, int64_t) : va_arg(list, int);

			if (number < 0)
				put('-');
			put_number(number < 0 ? -(uint64_t)number : (uint64_t)number, 10);
			break;
		}
		case 'u':
		case 'x':
			value = wide ? va_arg(list, uint64_t) : va_arg(list, unsigned);
			put_number(value, *format == 'x' ? 16 : 10);
			break;
		case 'p':
			put_string("0x");
			put_number(va_arg(list, uint64_t), 16);
			break;
		case '\0':
			format--;	/* a lone % at the end: let the loop see the NUL */
			break;
		default:
			put(*format);
		}
	}
	spin_unlock(&lock);
	va_end(list);
}
