"""Guest images, read into segments, an entry point and a symbol table: ours, and the two kinds that others build.

`load` looks at what a file holds: a Multiboot header makes it a Multiboot image (`vmm.multiboot`), the setup header of
the Linux/x86 boot protocol a Linux image (`vmm.linux_boot`). Any other ELF64 executable, and any other file called
`*.bin`, is a guest of our own contract (docs/seams.md §4), which this module reads itself. `Image.protocol` says how the
guest expects to be started.

The few ELF fields a loader needs are read with `struct`: importing pyelftools alone takes 30 ms, a tenth of the time a whole
`sevmm run hello` may take. (Debug information is another matter and stays with pyelftools.)

Invariants of an `Image` of our own contract: every segment lies inside [0x100000, 0x100000 + 3 MiB), segments do not
share a page, the entry lies in a segment. The other protocols' modules say what they allow. Whatever is wrong with a file
ends in `ImageError` with one sentence that names the file; a file is never trusted: each offset and count is checked
against the file's length before it is used.

ELF: System V ABI, chapters 4 and 5; AMD64 supplement.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

IMAGE_BASE = 0x100000
IMAGE_LIMIT = IMAGE_BASE + (3 << 20)
LARGEST_FILE = 64 << 20
"""A guest of 3 MiB may carry debug information; more than this is not a test guest, and is not read into memory."""

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_SHDR = struct.Struct("<IIQQQQIIQQ")
_SYM = struct.Struct("<IBBHQQ")
_ET_EXEC, _EM_X86_64, _PT_LOAD, _PT_INTERP, _SHT_SYMTAB = 2, 62, 1, 3, 2
_MACHINES = {3: "i386", 40: "ARM", 183: "AArch64", 243: "RISC-V", 21: "PowerPC64", 22: "S390"}


SEVMM, MULTIBOOT, LINUX32, LINUX64 = "sevmm", "multiboot", "linux-32", "linux-64"
"""How a guest is started: by our own contract, as Multiboot says, or at the 32-bit or 64-bit entry of the Linux/x86 boot protocol."""


class ImageError(Exception):
    """A guest image cannot be used; the text is one sentence that names the file."""


@dataclass(frozen=True)
class Segment:
    """`data` at GPA `gpa`, followed by zeroes up to `size` bytes."""

    gpa: int
    size: int
    data: bytes

    @property
    def end(self) -> int:
        """First GPA after the segment."""
        return self.gpa + self.size


@dataclass(frozen=True)
class Image:
    """A loaded image: `path`, `entry` (GPA), segments in ascending order, symbols by name (GPA), and the protocol that starts it.

    `setup`: the setup header of a Linux image, as it goes into boot_params; empty for others. `room`: memory that the image
    needs beyond its segments ends here (GPA; a Linux kernel says how much it needs to unpack itself), 0 where it says
    nothing.
    """

    path: str
    entry: int
    segments: tuple[Segment, ...]
    symbols: Mapping[str, int] = field(default_factory=dict)
    protocol: str = SEVMM
    setup: bytes = b""
    room: int = 0

    @property
    def end(self) -> int:
        """First GPA after everything that the image needs."""
        return max(self.segments[-1].end, self.room)


def load(path: str | os.PathLike[str]) -> Image:
    """Read the image at `path`: Multiboot, Linux, ELF64 for x86-64, or a file called `*.bin` as flat code for 0x100000.

    Raises `ImageError`.
    """
    from vmm import linux_boot, multiboot

    name = os.fspath(path)
    data = _read(name)
    if multiboot.recognises(data):
        return multiboot.load(name, data)
    if linux_boot.recognises(data):
        return linux_boot.load(name, data)
    if data[:4] == b"\x7fELF":
        return _Elf(name, data).image()
    if name.endswith(".bin"):
        if not data:
            raise ImageError(f"{name}: the file is empty")
        _check_place(name, IMAGE_BASE, len(data))
        return Image(name, IMAGE_BASE, (Segment(IMAGE_BASE, len(data), data),))
    raise ImageError(f"{name}: no ELF64 executable, Multiboot or Linux image, and no flat image called *.bin")


def _read(name: str) -> bytes:
    try:
        with open(name, "rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as failure:
        raise ImageError(f"{name}: {(failure.strerror or str(failure)).lower()}") from failure
    except ValueError as failure:  # a NUL in the name
        raise ImageError(f"{name!r}: {failure}") from failure
    if len(data) > LARGEST_FILE:
        raise ImageError(f"{name}: more than {LARGEST_FILE >> 20} MiB, too big for a guest image")
    return data


def _check_place(name: str, gpa: int, size: int) -> None:
    if gpa < IMAGE_BASE:
        raise ImageError(f"{name}: a segment at {gpa:#x} overlaps low memory, where our tables are; link it at {IMAGE_BASE:#x} or above")
    if size > IMAGE_LIMIT - gpa:
        what = "linked too high" if gpa >= IMAGE_LIMIT else "too big"
        raise ImageError(
            f"{name}: {what}: a segment at {gpa:#x} ends at {gpa + size:#x}, and a guest lies between {IMAGE_BASE:#x} and {IMAGE_LIMIT:#x};"
            f" link it there (gcc -static -no-pie -Wl,-Ttext={IMAGE_BASE:#x} -Wl,--build-id=none)"
        )


class _Elf:
    """The loader's view of one ELF64 file."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        self.data = data

    def image(self) -> Image:
        if len(self.data) < _EHDR.size:
            raise ImageError(f"{self.name}: truncated: {len(self.data)} bytes are less than an ELF64 header")
        ident, kind, machine, _, entry, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, _ = _EHDR.unpack_from(self.data)
        if ident[4] != 2 or ident[5] != 1:
            raise ImageError(f"{self.name}: not a 64-bit little-endian ELF file")
        if machine != _EM_X86_64:
            raise ImageError(f"{self.name}: made for {_MACHINES.get(machine, f'machine {machine}')}, not for x86-64")
        if kind != _ET_EXEC:
            raise ImageError(f"{self.name}: not a statically linked executable (ELF type {kind}); link with -static -no-pie")
        if phnum == 0 or phentsize != _PHDR.size:
            raise ImageError(f"{self.name}: corrupt: {phnum} program headers of {phentsize} bytes")
        segments = tuple(sorted(self._segments(phoff, phnum), key=lambda s: s.gpa))
        if not segments:
            raise ImageError(f"{self.name}: nothing to load")
        for low, high in pairwise(segments):
            if high.gpa & ~0xFFF < low.end:
                raise ImageError(f"{self.name}: segments at {low.gpa:#x} and {high.gpa:#x} overlap in a page")
        if not any(s.gpa <= entry < s.end for s in segments):
            raise ImageError(f"{self.name}: the entry point {entry:#x} is in no segment")
        return Image(self.name, entry, segments, self._symbols(shoff, shentsize, shnum))

    def _part(self, offset: int, size: int, what: str) -> bytes:
        if offset + size > len(self.data):
            raise ImageError(f"{self.name}: truncated: {what} ends at byte {offset + size}, the file has {len(self.data)}")
        return self.data[offset : offset + size]

    def _segments(self, phoff: int, phnum: int) -> Iterator[Segment]:
        for fields in _PHDR.iter_unpack(self._part(phoff, phnum * _PHDR.size, "the program header table")):
            kind, _, offset, vaddr, _, filesz, memsz, _ = fields
            if kind == _PT_INTERP:
                raise ImageError(f"{self.name}: wants a dynamic linker; link with -static -no-pie")
            if kind != _PT_LOAD or memsz == 0:
                continue
            if filesz > memsz:
                raise ImageError(f"{self.name}: corrupt: a segment has {filesz} bytes in the file but {memsz} in memory")
            _check_place(self.name, vaddr, memsz)
            yield Segment(vaddr, memsz, self._part(offset, filesz, f"the segment at {vaddr:#x}"))

    def _symbols(self, shoff: int, shentsize: int, shnum: int) -> dict[str, int]:
        """Named symbols and their values; a file without a symbol table has none, which is no error."""
        if shoff == 0 or shnum == 0:
            return {}
        if shentsize != _SHDR.size:
            raise ImageError(f"{self.name}: corrupt: section headers of {shentsize} bytes")
        sections = list(_SHDR.iter_unpack(self._part(shoff, shnum * _SHDR.size, "the section header table")))
        symbols: dict[str, int] = {}
        for section in sections:
            _, kind, _, _, offset, size, link, _, _, _ = section
            if kind != _SHT_SYMTAB:
                continue
            if link >= shnum or size % _SYM.size:
                raise ImageError(f"{self.name}: corrupt: the symbol table does not fit its section")
            strings = self._part(sections[link][4], sections[link][5], "the string table")
            for name, _, _, shndx, value, _ in _SYM.iter_unpack(self._part(offset, size, "the symbol table")):
                if name and shndx:
                    text = strings[name : strings.find(b"\0", name)] if name < len(strings) else b""
                    symbols[text.decode("utf-8", "replace")] = value
        return symbols
