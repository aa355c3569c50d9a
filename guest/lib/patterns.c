/*
 * Filling memory with patterns and checking it, see patterns.h. A failure names
 * the address, what was expected and what was seen.
 */
#include "patterns.h"

static volatile const uint64_t seeds[] = {
	[PATTERN_PRIVATE] = 0x7365766d6d2d5021UL,
	[PATTERN_SHARED] = 0x7365766d6d2d5321UL,
	[PATTERN_CONVERTED] = 0x7365766d6d2d5121UL,
};

/* splitmix64 (Steele, Lea, Flood 2014): any index without the ones before it. */
uint64_t pattern_word(enum pattern pattern, uint64_t offset)
{
	uint64_t z = seeds[pattern] + (offset / 8 + 1) * 0x9e3779b97f4a7c15UL;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9UL;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebUL;
	return z ^ (z >> 31);
}

static uint64_t word_at(uint64_t address)
{
	return *(volatile const uint64_t *)address;
}

void fill(uint64_t address, uint64_t size, enum pattern pattern, uint64_t offset)
{
	for (uint64_t at = 0; at < size; at += 8)
		*(volatile uint64_t *)(address + at) = pattern_word(pattern, offset + at);
}

void verify(const char *what, uint64_t address, uint64_t size, enum pattern pattern, uint64_t offset)
{
	for (uint64_t at = 0; at < size; at += 8) {
		uint64_t seen = word_at(address + at), expected = pattern_word(pattern, offset + at);

		CHECK(seen == expected, "%s: expected 0x%lx, seen 0x%lx at 0x%lx",
		      what, expected, seen, address + at);
	}
}

void verify_hidden(const char *what, uint64_t address, uint64_t size, enum pattern pattern, uint64_t offset)
{
	for (uint64_t at = 0; at < size; at += 8) {
		uint64_t seen = word_at(address + at);

		CHECK(seen != pattern_word(pattern, offset + at),
		      "%s: expected anything but 0x%lx, seen it at 0x%lx", what, seen, address + at);
	}
}

void verify_zero(const char *what, uint64_t address, uint64_t size)
{
	for (uint64_t at = 0; at < size; at += 8) {
		uint64_t seen = word_at(address + at);

		CHECK(seen == 0, "%s: expected 0x0, seen 0x%lx at 0x%lx", what, seen, address + at);
	}
}
