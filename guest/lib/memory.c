/*
 * The four functions a freestanding compiler may call by itself, and strlen.
 * String instructions keep them short and keep the compiler from turning a
 * loop of memset back into a call of memset.
 */
#include "guest.h"

void *memset(void *to, int byte, size_t size)
{
	void *at = to;

	asm volatile("rep stosb" : "+D"(at), "+c"(size) : "a"(byte) : "memory");
	return to;
}

void *memcpy(void *to, const void *from, size_t size)
{
	void *at = to;

	asm volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(size) : : "memory");
	return to;
}

void *memmove(void *to, const void *from, size_t size);
void *memmove(void *to, const void *from, size_t size)
{
	unsigned char *out = to;
	const unsigned char *in = from;

	if (out <= in)
		return memcpy(to, from, size);
	while (size--)
		*(volatile unsigned char *)(out + size) = in[size];
	return to;
}

int memcmp(const void *left, const void *right, size_t size)
{
	const unsigned char *a = left, *b = right;

	for (; size; a++, b++, size--)
		if (*a != *b)
			return *a - *b;
	return 0;
}

size_t strlen(const char *text)
{
	size_t length = 0;

	while (*(volatile const char *)(text + length))
		length++;
	return length;
}
