/*
 * multiboot: a guest of somebody else's contract. It is a 32-bit Multiboot
 * image, relies on nothing in lib/, and believes nothing it did not check.
 *
 * 1. The loader's magic, and the information it promises (memory, command
 *    line, map): else exit code 1.
 * 2. The memory map is in order, without overlap, says the same as
 *    mem_upper, and holds this program: else 2.
 * 3. Memory that the map calls usable keeps what is written, first and last
 *    word of each range above this program: else 3.
 * 4. fw_cfg knows its name and at least one CPU: else 4.
 * 5. The serial port is a 16550: the scratch register keeps a byte, the
 *    divisor hides the data register: else 5.
 * 6. It reaches 64-bit mode by itself (multiboot_start.S): else 7, or no end.
 *
 * Exit code 0, or N of "exit=N" on the command line.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum { LOADER_MAGIC = 0x2BADB002, WANTED = 1 << 0 | 1 << 2 | 1 << 6 };
enum { SERIAL = 0x3F8, IER = 1, LCR = 3, LSR = 5, SCRATCH = 7, DLAB = 0x80, READY = 0x20 };
enum { FW_CFG_SELECT = 0x510, FW_CFG_DATA = 0x511, FW_CFG_NB_CPUS = 5 };
enum { RAM = 1, MIB = 1 << 20 };

struct information {
	u32 flags, mem_lower, mem_upper, boot_device, command_line, mods[2], symbols[4], map_length, map;
};

struct range {
	u32 size;
	u64 base, length;
	u32 type;
} __attribute__((packed));

extern u8 image_start[], image_end[];

static u8 in8(u16 port)
{
	u8 value;
	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static void out8(u16 port, u8 value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static void out16(u16 port, u16 value)
{
	__asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port));
}

static void put(char c)
{
	while (!(in8(SERIAL + LSR) & READY))
		;
	out8(SERIAL, (u8)c);
}

static void print(const char *text)
{
	while (*text)
		put(*text++);
}

static void print_number(u32 value)
{
	if (value >= 10)
		print_number(value / 10);
	put((char)('0' + value % 10));
}

static u32 fail(u32 code, const char *what)
{
	print("multiboot: FAIL: ");
	print(what);
	put('\n');
	return code;
}

static int serial_is_a_16550(void)
{
	int fine;

	out8(SERIAL + LCR, DLAB | 3);
	out8(SERIAL, 1);
	out8(SERIAL + IER, 0);
	fine = in8(SERIAL) == 1 && in8(SERIAL + IER) == 0;
	out8(SERIAL + LCR, 3);
	out8(SERIAL + SCRATCH, 0x5A);
	return fine && in8(SERIAL + SCRATCH) == 0x5A && in8(SERIAL + LCR) == 3;
}

static int memory_keeps(u64 base, u64 length)
{
	volatile u32 *word = (volatile u32 *)(u32)base;
	volatile u32 *last = (volatile u32 *)(u32)(base + length - 4);

	*word = 0x12345678;
	*last = 0x9ABCDEF0;
	return *word == 0x12345678 && *last == 0x9ABCDEF0;
}

/* Usable ranges below 4 GiB are touched where this program is not; 0 or the exit code. */
static u32 check_map(const struct information *info)
{
	u64 end = 0, above = 0;
	u32 number = 0, held = 0;
	u32 at = info->map;

	while (at < info->map + info->map_length) {
		const struct range *range = (const struct range *)at;
		u64 base = range->base, stop = base + range->length;

		if (base < end || stop <= base)
			return fail(2, "the memory map is not in order");
		end = stop;
		number++;
		at += range->size + 4;
		if (range->type != RAM || base < MIB || base >> 32)
			continue;
		above += range->length;
		held += base <= (u32)image_start && stop >= (u32)image_end;
		if (base < (u32)image_end)
			base = (u32)image_end;
		if (!memory_keeps(base, stop - base))
			return fail(3, "memory does not keep what is written");
	}
	if (!held || above != (u64)info->mem_upper * 1024)
		return fail(2, "the memory map does not say what mem_upper says, or leaves this program out");
	print("memory: ");
	print_number((u32)(above / MIB));
	print(" MiB above 1 MiB, in a map of ");
	print_number(number);
	print(" ranges\n");
	return 0;
}

static u32 check_fw_cfg(void)
{
	static const char name[] = "QEMU";
	u32 cpus;

	out16(FW_CFG_SELECT, 0);
	for (u32 i = 0; i < 4; i++)
		if (in8(FW_CFG_DATA) != (u8)name[i])
			return fail(4, "there is no fw_cfg");
	out16(FW_CFG_SELECT, FW_CFG_NB_CPUS);
	cpus = in8(FW_CFG_DATA);
	cpus |= (u32)in8(FW_CFG_DATA) << 8;
	if (cpus == 0)
		return fail(4, "fw_cfg knows no CPU");
	print("cpus: ");
	print_number(cpus);
	put('\n');
	return 0;
}

/* N of "exit=N" after a blank, else 0. */
static u32 wanted_exit(const char *line)
{
	static const char key[] = " exit=";
	u32 matched = 0, value = 0;

	for (; *line && key[matched]; line++)
		matched = *line == key[matched] ? matched + 1 : *line == key[0];
	if (key[matched])
		return 0;
	for (; *line >= '0' && *line <= '9'; line++)
		value = value * 10 + (u32)(*line - '0');
	return value;
}

u32 main32(u32 magic, const struct information *info);

u32 main32(u32 magic, const struct information *info)
{
	u32 code;

	if (!serial_is_a_16550())
		return 5;
	if (magic != LOADER_MAGIC || (info->flags & WANTED) != WANTED)
		return fail(1, "the loader is no Multiboot loader");
	print("command line: ");
	print((const char *)info->command_line);
	put('\n');
	code = check_map(info);
	if (!code)
		code = check_fw_cfg();
	return code ? code : wanted_exit((const char *)info->command_line);
}
