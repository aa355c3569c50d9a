/*
 * KVM hypercalls as Documentation/virt/kvm/x86/hypercalls.rst numbers them.
 * vmmcall is what an AMD CPU has; KVM accepts it on Intel too.
 */
#ifndef SEVMM_HYPERCALL_H
#define SEVMM_HYPERCALL_H

#include <stdint.h>

#define KVM_HC_MAP_GPA_RANGE			12
#define KVM_MAP_GPA_RANGE_PAGE_SZ_4K		0UL
#define KVM_MAP_GPA_RANGE_PAGE_SZ_2M		1UL
#define KVM_MAP_GPA_RANGE_PAGE_SZ_1G		2UL
#define KVM_MAP_GPA_RANGE_ENCRYPTED		(1UL << 4)
#define KVM_MAP_GPA_RANGE_DECRYPTED		0UL
#define KVM_EINVAL				22

static inline int64_t map_gpa_range(uint64_t gpa, uint64_t pages, uint64_t attributes)
{
	int64_t result;

	asm volatile("vmmcall"
		     : "=a"(result)
		     : "a"(KVM_HC_MAP_GPA_RANGE), "b"(gpa), "c"(pages), "d"(attributes)
		     : "memory");
	return result;
}

#endif
