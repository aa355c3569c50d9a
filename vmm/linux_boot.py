"""The Linux/x86 boot protocol: a bzImage-style file, its setup header, boot_params, and the 32-bit and the 64-bit entry.

    file: boot sector, `setup_sects` sectors of real-mode code that are not used here, then the kernel
    0x100000 the kernel   0x91000 boot_params ("zero page")   0x92000 command line

The header at 0x1F1 of the file is copied into boot_params, as a loader of protocol 2.00 and later does; the kernel is entered

- at 0x100000 in 32-bit protected mode, flat segments 0x10 and 0x18, ESI = boot_params, other registers 0, interrupts off;
- or, when it says XLF_KERNEL_64, at 0x100000 + 0x200 in 64-bit mode on an identity map, RSI = boot_params.

The image is never relocated: 0x100000 is where every bzImage may be loaded. memtest86+ is such an image without being Linux.

A file is hostile: each offset and size is checked before it is used, and what is wrong is an `ImageError` of one sentence.

Documentation/arch/x86/boot.rst and zero-page.rst.
"""

from __future__ import annotations

import struct

from vmm import boot, pc
from vmm.image import LINUX32, LINUX64, Image, ImageError, Segment

LOAD = 0x100000
ENTRY64 = 0x200
OLDEST = 0x206
"""Oldest protocol that is loaded: 2.06 is the first whose header says how long a command line may be."""

_SETUP_SECTS, _SYSSIZE, _BOOT_FLAG, _JUMP, _MAGIC, _VERSION = 0x1F1, 0x1F4, 0x1FE, 0x201, 0x202, 0x206
_TYPE_OF_LOADER, _LOADFLAGS, _CODE32_START, _RAMDISK, _CMD_LINE_PTR = 0x210, 0x211, 0x214, 0x218, 0x228
_XLOADFLAGS, _CMDLINE_SIZE, _PREF_ADDRESS, _INIT_SIZE = 0x236, 0x238, 0x258, 0x260
_ACPI_RSDP, _ALT_MEM_K, _E820_ENTRIES, _VID_MODE, _E820_TABLE = 0x070, 0x1E0, 0x1E8, 0x1FA, 0x2D0
_LOADED_HIGH, _KERNEL_64 = 1 << 0, 1 << 0
_UNDEFINED_LOADER, _NORMAL_VIDEO = 0xFF, 0xFFFF
_SECTOR = 512


def recognises(data: bytes) -> bool:
    """Whether a file that begins with `data` has the setup header's magic."""
    return data[_MAGIC : _MAGIC + 4] == b"HdrS" and data[_BOOT_FLAG : _BOOT_FLAG + 2] == b"\x55\xaa"


def load(name: str, data: bytes) -> Image:
    """The kernel in `data`, the contents of the file `name`. Raises `ImageError`."""
    if not recognises(data) or len(data) < _VERSION + 2:
        raise ImageError(f"{name}: no setup header of the Linux/x86 boot protocol")
    (version,) = struct.unpack_from("<H", data, _VERSION)
    if version < OLDEST:
        raise ImageError(f"{name}: boot protocol {version >> 8}.{version & 0xFF:02} is older than 2.06, the oldest that is loaded here")
    end = _MAGIC + data[_JUMP]
    if end <= _CMDLINE_SIZE + 3 or end > len(data) or end > _E820_TABLE:
        raise ImageError(f"{name}: corrupt: a setup header that ends at {end:#x}")
    setup = data[_SETUP_SECTS:end]
    header = data[:end].ljust(_E820_TABLE, b"\0")
    if not header[_LOADFLAGS] & _LOADED_HIGH:
        raise ImageError(f"{name}: a zImage, which loads below 1 MiB; only bzImages are loaded")
    first = ((header[_SETUP_SECTS] or 4) + 1) * _SECTOR
    (paragraphs,) = struct.unpack_from("<I", header, _SYSSIZE)
    kernel = data[first:]
    if not kernel or -(-len(kernel) // 16) < paragraphs:
        raise ImageError(f"{name}: truncated: the kernel has {len(kernel)} bytes of {paragraphs * 16}")
    room = _room(name, header, version, len(kernel))
    (xloadflags,) = struct.unpack_from("<H", header, _XLOADFLAGS)
    long = version >= 0x20C and bool(xloadflags & _KERNEL_64)
    if long and len(kernel) <= ENTRY64:
        raise ImageError(f"{name}: truncated: a 64-bit entry at {ENTRY64:#x}, but the kernel has {len(kernel)} bytes")
    segments = (Segment(LOAD, len(kernel), kernel),)
    return Image(name, LOAD + ENTRY64 * long, segments, protocol=LINUX64 if long else LINUX32, setup=setup, room=room)


def _room(name: str, header: bytes, version: int, size: int) -> int:
    """First GPA after what the kernel says it needs before it looks at the memory map (init_size, from protocol 2.10 on)."""
    room = LOAD + size
    if version >= 0x20A:
        (preferred,) = struct.unpack_from("<Q", header, _PREF_ADDRESS)
        (needed,) = struct.unpack_from("<I", header, _INIT_SIZE)
        room = max(room, max(LOAD, preferred) + needed)
    if room > boot.LOW_MEMORY_MAX:
        raise ImageError(f"{name}: too big: the kernel wants memory up to {room:#x}, above {boot.LOW_MEMORY_MAX:#x}")
    return room


def command_line_limit(image: Image) -> int:
    """Bytes of command line that the kernel takes, without the NUL."""
    (limit,) = struct.unpack_from("<I", image.setup, _CMDLINE_SIZE - _SETUP_SECTS)
    return min(int(limit), pc.MAX_COMMAND_LINE)


def boot_params(image: Image, memory: int, rsdp: int = 0) -> bytes:
    """The zero page: the setup header as a loader completes it, and the e820 table. `rsdp`: GPA of the ACPI tables, 0 for none."""
    page = bytearray(boot.PAGE)
    page[_SETUP_SECTS : _SETUP_SECTS + len(image.setup)] = image.setup
    (_, low), *_ = boot.memory_layout(memory)
    entries = pc.memory_map(memory)
    struct.pack_into("<Q", page, _ACPI_RSDP, rsdp)
    struct.pack_into("<I", page, _ALT_MEM_K, (low - pc.ONE_MIB) >> 10)
    page[_E820_ENTRIES] = len(entries)
    struct.pack_into("<H", page, _VID_MODE, _NORMAL_VIDEO)
    page[_TYPE_OF_LOADER] = _UNDEFINED_LOADER
    struct.pack_into("<I", page, _CODE32_START, LOAD)
    struct.pack_into("<2I", page, _RAMDISK, 0, 0)
    struct.pack_into("<I", page, _CMD_LINE_PTR, pc.COMMAND_LINE)
    for number, entry in enumerate(entries):
        struct.pack_into("<QQI", page, _E820_TABLE + 20 * number, *entry)
    return bytes(page)


def pages(image: Image, memory: int, arguments: bytes, rsdp: int = 0) -> dict[int, bytes]:
    """What the loader puts beside the kernel, by GPA."""
    found = {
        pc.GDT: pc.gdt(long=image.protocol == LINUX64),
        pc.INFORMATION: boot_params(image, memory, rsdp),
        pc.COMMAND_LINE: arguments + b"\0",
    }
    if image.protocol == LINUX64:
        found[pc.TABLES] = pc.identity_tables()
    return found
