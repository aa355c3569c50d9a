/*
 * SHA-256 (FIPS 180-4), for guests that prove what they hold without showing it.
 */
#ifndef SEVMM_SHA256_H
#define SEVMM_SHA256_H

#include "guest.h"

#define SHA256_SIZE	32

struct sha256 {
	uint32_t state[8];
	uint64_t length;		/* bytes so far */
	uint8_t block[64];
};

void sha256_start(struct sha256 *hash);
void sha256_add(struct sha256 *hash, const void *data, size_t size);

/* The hash is used up and wiped: nothing of what was added stays in it. */
void sha256_finish(struct sha256 *hash, uint8_t digest[SHA256_SIZE]);

#endif
