"""Code pages: what the engine may have translated, and how the model notices that it changed.

For each page the guest fetches from, this keeps the bytes that were scanned (of an encrypted guest: a checksum), the
sensitive instructions found in them (scan.py), and puts a native stop hook on each of their virtual addresses. Hooks
are only added while translations live: the engine bakes a hook into a block when it translates it, so hooks must be
there before, and an address may mean another instruction in another address space; what stands there *now* is looked
up at the stop.

The engine sees stores of its own guest, not those of the VMM or of another vCPU. So before a vCPU goes on after
others had their turn, the bytes of every code page are compared with what was scanned (0.3 µs a page), and any
difference throws all translations away.
"""

from __future__ import annotations

import contextlib
import ctypes
import zlib
from collections.abc import Callable

from kvmapi.model.caller import PAGE
from kvmapi.model.cpu import scan
from kvmapi.model.cpu.native import Native
from kvmapi.model.cpu.scan import Site
from kvmapi.model.mem.secure import page_view

_MAX_HOOKS = 20_000  # a guest that executes everywhere costs a flush, not memory
_TAIL = scan.MAX_LENGTH - 1


class CodePage:
    """One page of code at one virtual page, as it was scanned. `stops` are the offsets at which a sensitive instruction
    may start, in code of any width; `watches` those at which only IF, or the end of an NMI handler, is at stake.
    """

    __slots__ = ("_flags", "_sites", "pointer", "secret", "stamp", "stops", "tail", "view", "watches")

    def __init__(self, pointer: int, tail: bytes, secret: bool, flags: bool) -> None:
        self.pointer = pointer
        self.secret = secret
        self.view = page_view(pointer)
        self.tail = tail
        self._flags = flags
        self._sites: dict[int, dict[int, Site]] = {}
        found = [self.sites(bits) for bits in (64, 32, 16)]
        kinds = {at: site.kind for sites in found for at, site in sites.items()}
        self.watches = frozenset(at for at, kind in kinds.items() if kind in scan.FLAG_KINDS)
        self.stops = frozenset(kinds.keys() - self.watches)
        self.stamp = self._stamp()

    def sites(self, bits: int) -> dict[int, Site]:
        """The sensitive instructions by offset, in code of this width."""
        found = self._sites.get(bits)
        if found is None:
            copy = bytearray(PAGE + len(self.tail))
            with memoryview(copy) as target:  # a slice of the bytearray itself would be assigned through a second copy
                target[:PAGE] = self.view
                target[PAGE:] = self.tail
            found = self._sites[bits] = scan.find(copy, PAGE, bits, self._flags)
            copy[:] = bytes(len(copy))  # plaintext must not stay on the heap
        return found

    def _stamp(self) -> bytes | int:
        return zlib.crc32(self.view) if self.secret else bytes(self.view)

    def head(self) -> bytes:
        """The first bytes: less than a cipher block."""
        return bytes(self.view[:_TAIL])

    def current(self) -> bool:
        """Is the page still what was scanned?"""
        return self._stamp() == self.stamp


class CodeCache:
    """All code pages of one vCPU's engine."""

    def __init__(self, native: Native, watching: ctypes.Array[ctypes.c_uint32], read: Callable[[int, int], bytes]) -> None:
        self.secret = False  # pages are plaintext of an encrypted guest: keep checksums of them, no copies
        self.watch_flags = False  # instructions that change IF, or end an NMI handler, can stop the engine too; flush after a change
        self.breakpoints: frozenset[int] = frozenset()  # addresses at which user space wants a stop; flush after a change
        self._native = native
        self._watching = watching
        self._read = read  # guest-virtual bytes, for the tail in the next page
        self._pages: dict[int, CodePage] = {}  # by virtual page
        self._hooks: dict[int, int] = {}
        self._overflow = False

    def fetched(self, va: int, pointer: int) -> None:
        """The engine is about to fetch from the page at `va`, which our process sees at `pointer`. May be called from
        inside the engine.
        """
        page = self._pages.get(va)
        if page is None or page.pointer != pointer or not page.current():
            tail = b""
            with contextlib.suppress(Exception):  # the next page may be anything: then no instruction continues there
                tail = self._read(va + PAGE, _TAIL)
            page = self._pages[va] = CodePage(pointer, tail, self.secret, self.watch_flags)
            self._hook(va, page)
        before = self._pages.get(va - PAGE)
        if before is not None and before.tail != page.head():
            # An instruction may reach from the page before into this one, and was scanned without it.
            self._pages[va - PAGE] = again = CodePage(before.pointer, page.head(), self.secret, self.watch_flags)
            if again.stops - before.stops or again.watches - before.watches:
                self._hook(va - PAGE, again)
                self._native.flush_code()

    def _hook(self, va: int, page: CodePage) -> None:
        hooks, native = self._hooks, self._native
        for offset in page.stops:
            if va + offset not in hooks:
                hooks[va + offset] = native.hook_stop_at(va + offset)
        for address in self.breakpoints:
            if address & -PAGE == va and address not in hooks:
                hooks[address] = native.hook_stop_at(address)
        for offset in page.watches:
            if va + offset not in hooks:
                hooks[va + offset] = native.hook_watch_at(va + offset, self._watching)
        self._overflow = len(hooks) > _MAX_HOOKS

    def site(self, va: int, bits: int) -> Site | None:
        """The sensitive instruction at `va` in code of this width, if the code there is what was scanned."""
        page = self._pages.get(va & -PAGE)
        return page.sites(bits).get(va & (PAGE - 1)) if page is not None else None

    def bytes_at(self, va: int, size: int) -> bytes:
        """Up to `size` bytes of code at `va`, as scanned; nothing if that page was not."""
        page = self._pages.get(va & -PAGE)
        if page is None:
            return b""
        at = va & (PAGE - 1)
        return bytes(page.view[at : at + size]) + page.tail[: max(0, at + size - PAGE)]

    def hooked(self, va: int) -> bool:
        """Would the engine stop at this address?"""
        return va in self._hooks

    def verify(self) -> None:
        """Someone else had a turn: throw translations away if any code page differs from what was scanned."""
        if self._overflow:
            self.flush()
            return
        for page in self._pages.values():  # at every entry: `current` without its calls
            if (zlib.crc32(page.view) if page.secret else bytes(page.view)) != page.stamp:
                self.flush()
                return

    def flush(self) -> None:
        """Forget every page, hook and translated block. Not from inside the engine."""
        for handle in self._hooks.values():
            self._native.unhook(handle)
        self._hooks.clear()
        self._pages.clear()
        self._overflow = False
        self._native.flush_code()
        self._native.flush_tlb()
