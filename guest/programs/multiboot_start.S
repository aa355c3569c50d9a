/*
 * What the multiboot guest cannot say in C: its header, its first steps in
 * 32-bit protected mode, and the way to 64-bit mode.
 *
 * A loader enters at `start` with EAX = magic and EBX = information. main32
 * (multiboot.c) does the checks; when it returns 0, page tables of our own map
 * the first GiB and the CPU goes to 64-bit mode, where a sum that needs 64-bit
 * registers decides between the two ends.
 */
MAGIC = 0x1BADB002
FLAGS = 3			/* modules page-aligned; memory information wanted */
CODE32 = 0x08
CODE64 = 0x10
DATA = 0x18
EXIT_PORT = 0xF4
CONSOLE = 0x3F8

	.section .multiboot, "a"
	.balign 4
	.long MAGIC, FLAGS, -(MAGIC + FLAGS)

	.text
	.code32
	.globl start
start:
	cld
	mov $stack_top, %esp
	push %ebx
	push %eax
	call main32
	add $8, %esp
	test %eax, %eax
	jnz leave

	lgdt gdt_descriptor
	mov $pml4, %edi			/* three pages, zero as .bss is: one entry, one entry, 512 leaves */
	movl $pdpt + 3, pml4
	movl $directory + 3, pdpt
	mov $directory, %edi
	mov $0x83, %eax			/* present, writable, 2 MiB */
	mov $512, %ecx
fill:	mov %eax, (%edi)
	add $0x200000, %eax
	add $8, %edi
	loop fill

	mov %cr4, %eax
	or $0x20, %eax			/* PAE */
	mov %eax, %cr4
	mov $pml4, %eax
	mov %eax, %cr3
	mov $0xC0000080, %ecx		/* EFER.LME */
	rdmsr
	or $0x100, %eax
	wrmsr
	mov %cr0, %eax
	or $0x80000000, %eax
	mov %eax, %cr0
	ljmp $CODE64, $start64

	.code64
start64:
	mov $DATA, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	movabs $0x123456789ABCDEF0, %rax
	movabs $0x0FEDCBA987654321, %rbx
	add %rbx, %rax			/* 0x2222222222222211: in 32-bit code another sum */
	movabs $0x2222222222222211, %rcx
	mov $not_there, %esi
	cmp %rcx, %rax
	jne say
	mov $there, %esi
say:	lodsb
	test %al, %al
	jz said
	mov %al, %bl
ready:	mov $CONSOLE + 5, %edx
	in %dx, %al
	test $0x20, %al
	jz ready
	mov $CONSOLE, %edx
	mov %bl, %al
	out %al, %dx
	jmp say
said:	xor %eax, %eax
	cmp $there_end, %esi
	je leave64
	mov $7, %eax
leave64:
	out %eax, $EXIT_PORT
stay64:	hlt
	jmp stay64

	.code32
leave:	out %eax, $EXIT_PORT
stay:	hlt
	jmp stay

	.section .rodata
there:	.asciz "64-bit mode reached\n"
there_end:
not_there: .asciz "64-bit mode: a wrong sum\n"

	.data
	.balign 8
gdt:	.quad 0
	.quad 0x00CF9B000000FFFF
	.quad 0x00AF9B000000FFFF
	.quad 0x00CF93000000FFFF
gdt_descriptor:
	.word gdt_descriptor - gdt - 1
	.long gdt

	.bss
	.balign 4096
pml4:	.skip 4096
pdpt:	.skip 4096
directory: .skip 4096
	.skip 8192
stack_top:

	.section .note.GNU-stack, "", @progbits
