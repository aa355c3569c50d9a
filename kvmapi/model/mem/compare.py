"""Are all pages what they were? Asked at every entry of the guest, of each page of code (cpu/code.py) and each page that stands decrypted
(secure.py), so machine code compares them.

A hundred pages cost 10 µs where Python's own comparison, a page at a time, costs 60; a kernel executes some thousand.

Called with rdi the pairs of addresses and rsi their number; al is 1 when the pages of each pair are the same, else 0.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from array import array
from collections.abc import Callable

from kvmapi.model.caller import PAGE

LISTING = """
xor eax, eax; next: cmp rax, rsi; jae out; mov rdx, rax; shl rdx, 4; mov rcx, [rdi+rdx]; mov r8, [rdi+rdx+8]; xor r9d, r9d
line: movdqu xmm0, [rcx+r9]; movdqu xmm1, [r8+r9]; pcmpeqb xmm0, xmm1; movdqu xmm2, [rcx+r9+16]; movdqu xmm3, [r8+r9+16]
pcmpeqb xmm2, xmm3; pand xmm0, xmm2; movdqu xmm4, [rcx+r9+32]; movdqu xmm5, [r8+r9+32]; pcmpeqb xmm4, xmm5; pand xmm0, xmm4
movdqu xmm6, [rcx+r9+48]; movdqu xmm7, [r8+r9+48]; pcmpeqb xmm6, xmm7; pand xmm0, xmm6; pmovmskb edx, xmm0; cmp edx, 65535
jne out; add r9d, 64; cmp r9d, 4096; jb line; inc rax; jmp next; out: cmp rax, rsi; sete al; ret
"""
CODE = bytes.fromhex("""
31c04839f00f83860000004889c248c1e204488b0c174c8b4417084531c9f3420f6f0409f3430f6f0c08660f74c1f3420f6f540910f3430f6f5c0810
660f74d3660fdbc2f3420f6f640920f3430f6f6c0820660f74e5660fdbc4f3420f6f740930f3430f6f7c0830660f74f7660fdbc6660fd7d081faffff
000075154183c1404181f900100000729548ffc0e971ffffff4839f00f94c0c3
""")
"""LISTING, assembled (GNU as, Intel syntax)."""

_Function = ctypes.PYFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_size_t)  # keeps the GIL: it is short


@functools.cache
def _all_same() -> tuple[ctypes._FuncPointer, mmap.mmap]:
    """The function, and the page that holds its code."""
    page = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page[: len(CODE)] = CODE
    return _Function(ctypes.addressof(ctypes.c_char.from_buffer(page))), page


class Comparison:
    """Pairs of pages by key. Whoever adds one keeps both where they are until it is replaced or all are cleared."""

    def __init__(self) -> None:
        self._pairs = array("Q")
        self._places: dict[int, int] = {}
        self._keys: list[int] = []  # in the order of the pairs
        self.same: Callable[[], bool]
        """Does every pair hold the same bytes? Made anew when the pairs move, so that asking runs nothing of Python."""
        self._moved()

    def put(self, key: int, pointer: int, copy: bytearray | None) -> None:
        """The page at `pointer` is to be as `copy` says; without a copy, as it is."""
        other = pointer if copy is None else ctypes.addressof(ctypes.c_char.from_buffer(copy))
        place = self._places.get(key)
        if place is None:
            self._places[key] = len(self._pairs)
            self._keys.append(key)
            self._pairs.extend((pointer, other))
        else:
            self._pairs[place], self._pairs[place + 1] = pointer, other
        self._moved()

    def drop(self, key: int) -> None:
        """No longer compare this pair. The last one takes its place."""
        place, last = self._places.pop(key), self._keys.pop()
        other, pointer = self._pairs.pop(), self._pairs.pop()
        if last != key:
            self._pairs[place], self._pairs[place + 1] = pointer, other
            self._places[last], self._keys[place // 2] = place, last
        self._moved()

    def _moved(self) -> None:
        at, words = self._pairs.buffer_info()
        self.same = functools.partial(_all_same()[0], at, words // 2)

    def look_away(self) -> None:
        """The memory may go away: no pair is looked at until they change."""
        self.same = functools.partial(_all_same()[0], 0, 0)

    def clear(self) -> None:
        """No pairs any more."""
        self._pairs = array("Q")
        self._places.clear()
        self._keys.clear()
        self._moved()
