/*
 * Between the parts of the #VC handler: vc.c, and vc_mmio.c for what devices in
 * memory take.
 */
#ifndef SEVMM_VC_H
#define SEVMM_VC_H

#include "ghcb.h"

/* Asks; true: done. False: the frame is the exception to be raised, its RIP still at the instruction. */
bool vc_ask(struct frame *frame, volatile struct ghcb *page, uint64_t code, uint64_t info_1, uint64_t info_2);

/* Says why on the console and ends the guest. */
_Noreturn void vc_give_up(const struct frame *frame, unsigned code, const char *why);

/* As vc_handle(), for VC_NPF. */
bool vc_mmio(struct frame *frame);

#endif
