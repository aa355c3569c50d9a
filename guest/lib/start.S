/*
 * The first instruction of every guest.
 *
 * The VMM enters here once per vCPU in 64-bit mode, ring 0, interrupts off,
 * with RDI = boot info, RSI = vCPU index and RSP on a stack of the vCPU's own,
 * 8 off a multiple of 16 as after a call. Nothing is set up here: GDT, IDT, TSS
 * and page tables are the VMM's gift.
 */
	.section .text.entry, "ax"
	.globl	_start
	.type	_start, @function
_start:
	cld
	xorl	%ebp, %ebp		/* ends a debugger's backtrace */
	subq	$8, %rsp		/* the ABI wants RSP + 8 divisible by 16 after the call */
	call	guest_entry		/* exits the VM on vCPU 0, returns on the others */
	.globl	guest_halt
	.type	guest_halt, @function
guest_halt:
	hlt				/* an NMI may wake us, so sleep again */
	jmp	guest_halt
	.size	_start, . - _start

	.section .note.GNU-stack, "", @progbits
