"""Where the engine stops, in a table that it looks up: an instruction costs the same to translate with one mark as with 100,000.

Unicorn keeps its code hooks in one list. Each instruction that is translated walks all of it, each translated block does so
again, and each hook that is deleted walks every list there is. A kernel's text has hundreds of thousands of bytes that could
begin a sensitive instruction, so that nearly all of the time went there. Exits it keeps in a tree, and asks the tree about each
instruction *before* it looks for hooks; but after each run it visits all of them.

So there are two hooks, of the stop stub and of the watch stub, and one exit, at address 0, which Unicorn does not visit. The
tree's comparison is ours: given the address of an instruction it looks up the table, makes the hook that belongs there the only
element of the list of hooks, or empties the list, and answers whether the address is an exit. As Unicorn counts one hook, it
calls the hook from the translated code itself, and what the list holds while that runs does not matter.

The table: a hash of pages, and for each page 4096 bytes of `NONE`, `WATCH`, `STOP` or `EXIT`. All that this assumes of
Unicorn's structures is found by looking for what was just put there, and checked (`Marks._find`).

Called as a GCompareDataFunc: rdi points to the address, rdx is our block: where the list's head is, the pages' bytes, for WATCH and
STOP the list's element and the hook (whose bounds become this one address), and at 64 the hash of page numbers plus one.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import struct
from typing import TYPE_CHECKING

from kvmapi.model.caller import PAGE
from kvmapi.model.cpu.layout import expect
from kvmapi.model.cpu.native import own_memory
from kvmapi.model.cpu.stubs import stubs

if TYPE_CHECKING:
    from kvmapi.model.cpu.native import Native

LISTING = """
mov rax, [rdi]; mov rcx, rax; shr rcx, 12; lea r9, [rcx+1]; movabs r8, 0x9e3779b97f4a7c15; imul r8, rcx; shr r8, 51;
probe: mov r10, [rdx+64+r8*8]; cmp r10, r9; je found; test r10, r10; jz none; inc r8d; and r8d, 8191; jmp probe;
found: shl r8, 12; add r8, [rdx+8]; mov ecx, eax; and ecx, 4095; movzx ecx, byte ptr [r8+rcx]; cmp ecx, 3; je ends;
test ecx, ecx; jz none; shl ecx, 4; mov r9, [rdx+rcx]; mov r10, [rdx+rcx+8]; mov [r10+24], rax; mov [r10+32], rax;
mov r8, [rdx]; mov [r8], r9; mov eax, 1; ret; none: mov r8, [rdx]; mov qword ptr [r8], 0; mov eax, 1; ret;
ends: mov r8, [rdx]; mov qword ptr [r8], 0; xor eax, eax; ret;
"""
CODE = bytes.fromhex("""
488b074889c148c1e90c4c8d490149b8157c4a7fb979379e4c0fafc149c1e8334e8b54c2404d39ca74114d85d2744a41ffc04181e0ff1f0000ebe549
c1e00c4c03420889c181e1ff0f0000410fb60c0883f903743485c97420c1e1044c8b0c0a4c8b540a0849894218498942204c8b024d8908b801000000
c34c8b0249c70000000000b801000000c34c8b0249c7000000000031c0c3
""")
"""LISTING, assembled (GNU as, Intel syntax)."""

NONE, WATCH, STOP, EXIT = range(4)
MAX_PAGES = 4000  # fewer than half of the buckets: marks of a page may reach into the next one
_BUCKETS, _HASH, _HASH_SHIFT = 8192, 0x9E3779B97F4A7C15, 51
_KEYS = 64
_ENGINE_BYTES = 4096
_BEGIN = 24  # of a hook: its bounds, two words
_COMPARE, _COMPARE_DATA = 8, 32  # of a tree
_MARK = 0x53_65_76_4D_6D_61_72_6B
_U64 = (1 << 64) - 1
_WORD = struct.Struct("<Q")


@functools.cache
def _stub() -> tuple[int, mmap.mmap]:
    """The address of the code, and the page that holds it."""
    page = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page[: len(CODE)] = CODE
    return ctypes.addressof(ctypes.c_char.from_buffer(page)), page


def _at(address: int) -> ctypes.c_uint64:
    return ctypes.c_uint64.from_address(address)


class Marks:
    """The marks of one engine, whose hooks of code and exits are these from now on and no others."""

    def __init__(self, native: Native, flag: ctypes.Array[ctypes.c_uint32]) -> None:
        """WATCH counts while `flag[0]` is not zero. Raises EngineMismatch."""
        always = (ctypes.c_uint32 * 1)(1)
        self._keep = always, flag
        self._bytes = mmap.mmap(-1, _BUCKETS * PAGE)
        self._block = mmap.mmap(-1, _KEYS + 8 * _BUCKETS)
        self._slots: dict[int, int] = {}  # pages: where their bytes are
        self._find(native, ctypes.addressof(flag), ctypes.addressof(always))

    def _find(self, native: Native, flag: int, always: int) -> None:
        """Add the hooks and the exit, find them, and put our function in between."""
        engine, fd = native.handle, own_memory(os.getpid())

        def peek(address: int) -> int:
            try:
                data = os.pread(fd, 8, address) if PAGE <= address < 1 << 47 else b""
            except OSError:
                data = b""
            return _WORD.unpack(data)[0] if len(data) == 8 else 0

        def structure(form: str) -> tuple[int, ...]:
            data = os.pread(fd, _ENGINE_BYTES, engine)
            return struct.unpack(f"<{len(data) // struct.calcsize(form)}{form}", data)

        native.set_exits((_MARK,))
        trees = [word for word in structure("Q") if peek(peek(peek(word))) == _MARK]
        expect(len(set(trees)) == 1 and peek(trees[0] + _COMPARE_DATA) == 0, "its exits")
        native.set_exits((0,))
        watch = native.hook_code_anywhere(stubs().watch, flag)
        before = structure("I")
        stop = native.hook_code_anywhere(stubs().watch, always)
        counts = [at for at, (old, new) in enumerate(zip(before, structure("I"))) if (old, new) == (1, 2)]
        words = structure("Q")
        heads = [at for at in range(len(words) - 1) if peek(words[at] + 8) == watch and peek(words[at + 1] + 8) == stop]
        expect(len(counts) == 1 and len(heads) == 1, "its hooks")
        first, second = words[heads[0]], words[heads[0] + 1]
        expect(
            peek(first) == second and all(peek(hook + _BEGIN) == 1 and peek(hook + _BEGIN + 8) == 0 for hook in (watch, stop)), "its hooks"
        )
        self._head, self._first, self._second = engine + 8 * heads[0], first, second
        pages = ctypes.addressof(ctypes.c_char.from_buffer(self._bytes))
        struct.pack_into("<6Q", self._block, 0, self._head, pages, first, watch, second, stop)
        _at(first).value = 0
        ctypes.c_uint32.from_address(engine + 4 * counts[0]).value = 1
        _at(trees[0] + _COMPARE_DATA).value = ctypes.addressof(ctypes.c_char.from_buffer(self._block))
        _at(trees[0] + _COMPARE).value = _stub()[0]

    def release(self) -> None:
        """Before the engine is closed: it finds its list as it was."""
        _at(self._head).value, _at(self._first).value = self._first, self._second

    @property
    def full(self) -> bool:
        """Can no further page be marked?"""
        return len(self._slots) >= MAX_PAGES

    def at(self, address: int) -> int:
        """What is marked there."""
        slot = self._slots.get(address >> 12)
        return self._bytes[slot + (address & PAGE - 1)] if slot is not None else NONE

    def put(self, page: int, marks: dict[int, int]) -> None:
        """Mark addresses; where something is marked already, the greater counts. `page` begins the page that they are of, which
        counts as marked from now on even without any.
        """
        if page >> 12 not in self._slots:
            self._slot(page >> 12)
        for address, kind in marks.items():
            slot = self._slots.get(address >> 12)
            at = (self._slot(address >> 12) if slot is None else slot) + (address & PAGE - 1)
            self._bytes[at] = max(self._bytes[at], kind)

    def _slot(self, page: int) -> int:
        bucket = (page * _HASH & _U64) >> _HASH_SHIFT
        while _WORD.unpack_from(self._block, _KEYS + 8 * bucket)[0]:
            bucket = bucket + 1 & _BUCKETS - 1
        _WORD.pack_into(self._block, _KEYS + 8 * bucket, page + 1)
        slot = self._slots[page] = bucket * PAGE
        return slot

    def clear(self) -> None:
        """Nothing is marked any more."""
        if self._slots:
            self._slots.clear()
            self._block[_KEYS:] = bytes(8 * _BUCKETS)
            self._bytes.madvise(mmap.MADV_DONTNEED)
