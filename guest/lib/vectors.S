/*
 * Exception entry: 32 stubs of exactly 16 bytes, and the common path.
 *
 * The VMM fills IDT gate v with vector_stubs + 16 * v (docs/seams.md section 4),
 * so the stride is part of the contract; .balign in the macro keeps it and .org
 * after the last stub proves it. A stub makes all vectors look alike: error code
 * (0 where the CPU pushes none), vector number, then struct frame of guest.h
 * grows downwards. The CPU aligned RSP to 16 before it pushed SS.
 */
	.text
	.macro	stub vector
	.balign	16
	/* 8 #DF, 10 #TS, 11 #NP, 12 #SS, 13 #GP, 14 #PF, 17 #AC, 21 #CP, 29 #VC, 30 #SX */
	.if	!((0x60227d00 >> \vector) & 1)
	pushq	$0
	.endif
	pushq	$\vector
	jmp	exception_common
	.endm

	.balign	16
	.globl	vector_stubs
	.type	vector_stubs, @function
vector_stubs:
	.irp	v, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
	stub	\v
	.endr
	.org	vector_stubs + 32 * 16	/* an error if any stub is longer than 16 bytes */
	.size	vector_stubs, . - vector_stubs

	.type	exception_common, @function
exception_common:
	cld
	pushq	%rax
	pushq	%rcx
	pushq	%rdx
	pushq	%rbx
	pushq	%rbp
	pushq	%rsi
	pushq	%rdi
	pushq	%r8
	pushq	%r9
	pushq	%r10
	pushq	%r11
	pushq	%r12
	pushq	%r13
	pushq	%r14
	pushq	%r15
	/* 5 words by the CPU, 2 by the stub, 15 here: 22 words from an aligned
	 * RSP, which leaves it aligned for the call. */
	movq	%rsp, %rdi
	call	exception
	popq	%r15
	popq	%r14
	popq	%r13
	popq	%r12
	popq	%r11
	popq	%r10
	popq	%r9
	popq	%r8
	popq	%rdi
	popq	%rsi
	popq	%rbp
	popq	%rbx
	popq	%rdx
	popq	%rcx
	popq	%rax
	addq	$16, %rsp		/* vector and error code */
	iretq
	.size	exception_common, . - exception_common

	.section .note.GNU-stack, "", @progbits
