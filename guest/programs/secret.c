/*
 * secret: what the owner sealed arrives in private memory, and is proved without being shown.
 *
 * 1. Look at the secret page (docs/seams.md section 4): magic, length, bytes.
 *    Without a secret say so and fail; a length that cannot be is a check.
 * 2. Check that the page is private: its entry has the C-bit.
 * 3. Under SEV look at it through an alias without the C-bit: what the host
 *    sees must not have the magic.
 * 4. Print SHA-256(nonce || secret), the nonce being the argument nonce=TEXT.
 *    Who knows the secret and chose the nonce knows that this very guest has it.
 * 5. Wipe the page: it is not needed twice.
 */
#include "paging.h"
#include "sha256.h"

#define SECRET_PAGE	0x6000UL
#define MAGIC		"SEVMMSEC"

struct secret_page {
	char magic[8];
	uint64_t length;		/* bytes */
	uint8_t bytes[PAGE_SIZE - 16];
};
_Static_assert(sizeof(struct secret_page) == PAGE_SIZE, "secret page layout");

static bool has_magic(const volatile void *page)
{
	return memcmp((const void *)page, MAGIC, 8) == 0;
}

static void look_through_alias(const struct boot_info *boot)
{
	uint64_t spare = boot->test_area + boot->test_size - PAGE_SIZE;
	uint64_t own = *get_pte(spare), target = *get_pte(SECRET_PAGE);

	if (!boot->c_mask)
		return;
	CHECK(target & boot->c_mask, "the secret page's entry 0x%lx has no C-bit", target);
	set_pte(spare, target & ~boot->c_mask);
	CHECK(!has_magic((const volatile void *)spare), "the secret page is readable without the C-bit");
	set_pte(spare, own);
	print("secret: an alias without C-bit shows nothing\n");
}

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	struct secret_page *page = (struct secret_page *)SECRET_PAGE;
	uint8_t digest[SHA256_SIZE];
	struct sha256 hash;
	const char *nonce;
	size_t nonce_length;

	(void)vcpu;
	paging_start(boot);
	if (!has_magic(page)) {
		print("secret: no secret arrived\n");
		return EXIT_CHECK;
	}
	CHECK(page->length && page->length <= sizeof(page->bytes), "a secret of %lu bytes, at most %lu fit",
	      page->length, sizeof(page->bytes));
	print("secret: %lu bytes arrived\n", page->length);
	look_through_alias(boot);

	nonce = argument_text(boot, "nonce", &nonce_length);
	sha256_start(&hash);
	if (nonce)
		sha256_add(&hash, nonce, nonce_length);
	sha256_add(&hash, page->bytes, page->length);
	sha256_finish(&hash, digest);
	memset(page, 0, PAGE_SIZE);

	print("secret: SHA-256(%s) = ", nonce ? "nonce || secret" : "secret");
	for (unsigned i = 0; i < SHA256_SIZE; i++)
		print("%x%x", digest[i] >> 4, digest[i] & 15);
	print("\n");
	return EXIT_PASS;
}
