/*
 * Patterns that fill memory, one 64-bit word per 8 bytes of offset, from the
 * splitmix64 generator. guest/patterns.py computes the same.
 *
 * The words exist only at run time: the seed is read through a volatile, so the
 * compiler cannot put one into the image, and a host that finds the private
 * pattern in memory has found a leak.
 */
#ifndef SEVMM_PATTERNS_H
#define SEVMM_PATTERNS_H

#include "guest.h"

enum pattern { PATTERN_PRIVATE, PATTERN_SHARED, PATTERN_CONVERTED };

uint64_t pattern_word(enum pattern pattern, uint64_t offset);

/* Fills or checks [address, address + size) with the pattern from `offset` on. */
void fill(uint64_t address, uint64_t size, enum pattern pattern, uint64_t offset);
void verify(const char *what, uint64_t address, uint64_t size, enum pattern pattern, uint64_t offset);

/* No word of the range may be the pattern's. */
void verify_hidden(const char *what, uint64_t address, uint64_t size, enum pattern pattern, uint64_t offset);
void verify_zero(const char *what, uint64_t address, uint64_t size);

#endif
