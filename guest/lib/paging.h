/*
 * The guest's own page tables, and conversions between private and shared.
 * Addresses are virtual and physical at once: the VMM maps memory one to one.
 */
#ifndef SEVMM_PAGING_H
#define SEVMM_PAGING_H

#include "guest.h"

#define PTE_PRESENT	(1UL << 0)
#define PTE_WRITE	(1UL << 1)
#define PTE_LARGE	(1UL << 7)

/* To be called before the rest: learns the C-bit, checks CR3 against the boot info. */
void paging_start(const struct boot_info *boot);

/* The 4 KiB leaf entry that maps `address`; ends the guest if there is none. */
uint64_t *get_pte(uint64_t address);
void set_pte(uint64_t address, uint64_t pte);

/* Where `address` is mapped to, whatever the size of its page, and whether with the C-bit; false if it is not. */
bool find_gpa(uint64_t address, uint64_t *gpa, bool *encrypted);

/* Bits of a leaf entry that are an address, without the C-bit. */
uint64_t pte_gpa(uint64_t pte);

/*
 * Converts pages: C-bit in the own tables, then MAP_GPA_RANGE, which must
 * succeed. Contents afterwards are undefined, as on hardware, unless the VM type
 * says more (see convert.c).
 */
void make_private(uint64_t address, uint64_t pages);
void make_shared(uint64_t address, uint64_t pages);

#endif
