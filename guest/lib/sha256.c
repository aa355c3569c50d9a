/*
 * SHA-256, written for size: 64 rounds over a schedule of 16 words that is
 * extended as it is used.
 */
#include "sha256.h"

#define BLOCK	64

static const uint32_t constants[64] = {
	0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
	0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
	0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
	0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
	0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
	0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
	0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
	0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static inline uint32_t rotate(uint32_t word, unsigned count)
{
	return word >> count | word << (32 - count);
}

static inline uint32_t big_endian(const uint8_t *at)
{
	return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static void compress(struct sha256 *hash)
{
	uint32_t schedule[16], v[8];

	for (unsigned i = 0; i < 16; i++)
		schedule[i] = big_endian(hash->block + 4 * i);
	memcpy(v, hash->state, sizeof(v));
	for (unsigned i = 0; i < 64; i++) {
		uint32_t a = v[0], e = v[4], word = schedule[i & 15];
		uint32_t one, two;

		if (i >= 16) {
			uint32_t early = schedule[(i + 1) & 15], late = schedule[(i + 14) & 15];

			word += rotate(early, 7) ^ rotate(early, 18) ^ early >> 3;
			word += rotate(late, 17) ^ rotate(late, 19) ^ late >> 10;
			word += schedule[(i + 9) & 15];
			schedule[i & 15] = word;
		}
		one = v[7] + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & v[5]) ^ (~e & v[6])) + constants[i] + word;
		two = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
		for (unsigned j = 7; j; j--)
			v[j] = v[j - 1];
		v[4] += one;
		v[0] = one + two;
	}
	for (unsigned i = 0; i < 8; i++)
		hash->state[i] += v[i];
	memset(schedule, 0, sizeof(schedule));
	asm volatile("" : : "r"(schedule) : "memory");	/* the wipe is not dead code */
}

void sha256_start(struct sha256 *hash)
{
	static const uint32_t first[8] = {
		0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
	};

	memcpy(hash->state, first, sizeof(first));
	hash->length = 0;
}

void sha256_add(struct sha256 *hash, const void *data, size_t size)
{
	const uint8_t *from = data;

	while (size) {
		size_t used = hash->length % BLOCK, part = BLOCK - used < size ? BLOCK - used : size;

		memcpy(hash->block + used, from, part);
		hash->length += part;
		from += part;
		size -= part;
		if (used + part == BLOCK)
			compress(hash);
	}
}

void sha256_finish(struct sha256 *hash, uint8_t digest[SHA256_SIZE])
{
	static const uint8_t padding[BLOCK] = { 0x80 };
	uint64_t bits = hash->length * 8;
	uint8_t tail[8];

	/* 0x80, zeroes up to 8 bytes before the end of a block, the length in bits */
	sha256_add(hash, padding, BLOCK - (hash->length + 8) % BLOCK);
	for (unsigned i = 0; i < 8; i++)
		tail[i] = bits >> (56 - 8 * i);
	sha256_add(hash, tail, sizeof(tail));
	for (unsigned i = 0; i < SHA256_SIZE; i++)
		digest[i] = hash->state[i / 4] >> (24 - 8 * (i % 4));
	memset(hash, 0, sizeof(*hash));
	asm volatile("" : : "r"(hash) : "memory");
}
