"""Code pages: what the engine may have translated, and how the model notices that it changed.

For each page the guest fetches from, this keeps the bytes that were scanned (of an encrypted guest: a checksum), the
sensitive instructions found in them (scan.py), and puts a native stop hook on each of their virtual addresses. Hooks
are only added while translations live: the engine bakes a hook into a block when it translates it, so hooks must be
there before, and an address may mean another instruction in another address space; what stands there *now* is looked
up at the stop.

Some bytes the engine must not even translate, because its code generator aborts at them (hazards.fatal): those
addresses are made exits. So are those at which a block must end because the engine's translator would run out of room
(blocks.cuts).

Who may change code:

- *The guest.* The engine voids the blocks that a store overlaps, but by default looks at the first store to a page
  only: a hook on the page that never fires (`hook_stores_at`) keeps it looking. A page that is stored to loses its
  executable TLB entries, so that it is scanned again before anything new is translated from it (mmu.py).
- *The VMM, another vCPU, the model itself.* Before a vCPU goes on after others had their turn, the bytes of every
  code page are compared with what they were when it stopped (0.3 µs a page), and any difference throws all
  translations away.
"""

from __future__ import annotations

import contextlib
import ctypes
import zlib
from collections.abc import Callable

from kvmapi.model.caller import PAGE
from kvmapi.model.cpu import blocks, hazards, scan
from kvmapi.model.cpu.marks import EXIT, NONE, STOP, WATCH, Marks
from kvmapi.model.cpu.native import Native
from kvmapi.model.cpu.scan import Site
from kvmapi.model.mem.compare import Comparison
from kvmapi.model.mem.secure import page_view

_TAIL = scan.MAX_LENGTH - 1
_MOST_KNOWN = 4096


Finder = Callable[[bytes | bytearray, int, int, dict[int, Site]], None]
"""Like hazards.find, adding to the sites that it is given."""


class Retranslate(Exception):
    """Blocks that are translated already must not run: throw them away and start again. From inside the engine."""


class CodePage:
    """One page of code at one virtual page, as it was scanned. `stops` are the offsets at which a sensitive instruction
    may start, in code of any width; `watches` those at which only IF, or the end of an NMI handler, is at stake.
    """

    __slots__ = (
        "_bounds",
        "_flags",
        "_more",
        "cuts",
        "fatal",
        "pointer",
        "secret",
        "seen",
        "sites",
        "stamp",
        "stops",
        "tail",
        "view",
        "watches",
    )

    def __init__(self, va: int, pointer: int, tail: bytes, secret: bool, flags: bool, more: Finder | None = None) -> None:
        self.pointer = pointer
        self.secret = secret
        self.view = page_view(pointer)
        self.tail = tail
        self._flags = flags
        self._more = more
        self.sites: dict[int, dict[int, Site]] = {}  # by width of code and offset
        self.fatal: set[int] = set()  # addresses that the engine must not translate
        self.cuts: set[int] = set()  # addresses at which a block must end
        self._bounds: dict[int, int] | None = None  # blocks.count
        found = [self._scan(bits, va) for bits in (64, 32, 16)]
        kinds = {at: site.kind for sites in found for at, site in sites.items()}
        self.watches = frozenset(at for at, kind in kinds.items() if kind in scan.WATCHED)
        self.stops = frozenset(kinds.keys() - self.watches)
        self.stamp = self._stamp()
        self.seen: bytearray | int = self.stamp if isinstance(self.stamp, int) else bytearray(self.stamp)

    def _scan(self, bits: int, va: int) -> dict[int, Site]:
        copy = bytearray(PAGE + len(self.tail))
        with memoryview(copy) as target:  # a slice of the bytearray itself would be assigned through a second copy
            target[:PAGE] = self.view
            target[PAGE:] = self.tail
        found = self.sites[bits] = hazards.find(copy, PAGE, bits, self._flags)
        if self._more is not None:
            self._more(copy, PAGE, bits, found)
        self.fatal.update(va + at for at in hazards.fatal(copy, PAGE))
        if self._bounds is None:
            self._bounds = blocks.count(copy)
        self.cuts.update(va + at for at in blocks.cuts(copy, PAGE, bits, self._bounds[bits]))
        copy[:] = bytes(len(copy))  # plaintext must not stay on the heap
        return found

    def exits(self) -> set[int]:
        """Addresses before which the engine must end a block."""
        return self.fatal | self.cuts

    def look(self) -> None:
        """What stands here now is the guest's own doing."""
        if isinstance(self.seen, int):
            self.seen = zlib.crc32(self.view)
        else:
            self.seen[:] = self.view  # it stays where it is

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
        self.more: Finder | None = None  # adds what must stop the engine in this kind of guest only; flush after a change
        self.breakpoints: frozenset[int] = frozenset()  # addresses at which user space wants a stop; flush after a change
        self._native = native
        self._watching = watching
        self._read = read  # guest-virtual bytes, for the tail in the next page
        self._pages: dict[int, CodePage] = {}  # by virtual page
        self.pointers: dict[int, set[int]] = {}  # where our process sees a page -> its virtual pages
        self.mixed: set[int] = set()  # virtual pages that are executed and stored to
        self._marks = Marks(native, watching)
        self._compared = Comparison()  # by virtual page: what stands there and what is to
        self._secrets: dict[int, CodePage] = {}  # those of which there is a checksum only
        self._store_hooks: list[int] = []
        self._flushing = False
        self.known: dict[int, Callable[[], int | None]] = {}  # what is done at stops that were met, by `Registers.place`
        self.stale = False  # a block may have been translated without a hook that it needs: `flush_blocks` before going on

    def destroy(self) -> None:
        """Before the engine is closed."""
        self._marks.release()

    def fetched(self, va: int, pointer: int, address: int) -> None:
        """The engine is about to fetch from the page at `va`, which our process sees at `pointer`, and it at its
        physical `address`. May be called from inside the engine. Raises Retranslate.
        """
        if self._flushing:
            return
        page = self._pages.get(va)
        if page is None and self._marks.full:
            self.stale = True
            raise Retranslate
        if page is None or page.pointer != pointer or not page.current():
            tail = b""
            with contextlib.suppress(Exception):  # the next page may be anything: then no instruction continues there
                tail = self._read(va + PAGE, _TAIL)
            page = self._add(va, CodePage(va, pointer, tail, self.secret, self.watch_flags, self.more))
            if pointer not in self.pointers:
                self.pointers[pointer] = set()
                self._store_hooks.append(self._native.hook_stores_at(address))
            self.pointers[pointer].add(va)
            known = self._marks.at(va)
            self._hook(va, page)
            if self._marks.at(va) != known:
                # A block may come from the page before: the engine looked for a hook here before it asked for the page.
                self.stale = True
                raise Retranslate
        before = self._pages.get(va - PAGE)
        if before is not None and before.tail != page.head():
            # An instruction may reach from the page before into this one, and was scanned without it.
            again = CodePage(va - PAGE, before.pointer, page.head(), self.secret, self.watch_flags, self.more)
            self._add(va - PAGE, again)
            if again.stops - before.stops or again.watches - before.watches or again.exits() - before.exits():
                self._hook(va - PAGE, again)
                self.stale = True
                raise Retranslate

    def _add(self, va: int, page: CodePage) -> CodePage:
        """A page was scanned, perhaps again."""
        self.known.clear()
        self._pages[va] = page
        self._compared.put(va, page.pointer, None if isinstance(page.seen, int) else page.seen)
        if page.secret:
            self._secrets[va] = page
        else:
            self._secrets.pop(va, None)
        return page

    def stored(self, pointer: int) -> None:
        """The guest may from now on store to a page of `pointers`: changes of it are its own doing."""
        self.mixed |= self.pointers[pointer]

    def _hook(self, va: int, page: CodePage) -> None:
        marks = dict.fromkeys((va + offset for offset in page.watches), WATCH)
        marks.update(dict.fromkeys((va + offset for offset in page.stops), STOP))
        marks.update(dict.fromkeys((address for address in self.breakpoints if address & -PAGE == va), STOP))
        marks.update(dict.fromkeys(page.exits(), EXIT))
        self._marks.put(va, marks)

    def site(self, va: int, bits: int) -> Site | None:
        """The sensitive instruction at `va` in code of this width, if the code there is what was scanned."""
        page = self._pages.get(va & -PAGE)
        return page.sites[bits].get(va & (PAGE - 1)) if page is not None else None

    def remember(self, place: int, stop: Callable[[], int | None]) -> None:
        """The engine stops there, and `stop` is done: next time it need not be looked up. Until the code is scanned again."""
        if len(self.known) >= _MOST_KNOWN:
            self.known.clear()
        self.known[place] = stop

    def bytes_at(self, va: int, size: int) -> bytes:
        """Up to `size` bytes of code at `va`, as far as pages were scanned."""
        page = self._pages.get(va & -PAGE)
        if page is None:
            return b""
        at = va & (PAGE - 1)
        code = bytes(page.view[at : at + size])
        if len(code) == size:
            return code
        after = self._pages.get((va & -PAGE) + PAGE)
        return code + bytes((after.view if after is not None else page.tail)[: size - len(code)])

    def hooked(self, va: int) -> bool:
        """Would the engine stop at this address?"""
        return self._marks.at(va) != NONE

    def look(self) -> None:
        """The engine has stopped: what the guest made of mixed pages is its own doing."""
        for va in self.mixed:
            page = self._pages.get(va)
            if page is not None:
                page.look()

    def verify(self) -> None:
        """Someone else had a turn: throw translations away if any code page differs from what was scanned."""
        if not self._compared.same() or (self._secrets and any(zlib.crc32(page.view) != page.seen for page in self._secrets.values())):
            self.flush()

    def lose_memory(self) -> None:
        """Memory with code may go away any moment, from any thread: it is not looked at any more, and `flush` follows before the
        vCPU goes on.
        """
        self._compared.look_away()

    def flush_blocks(self) -> None:
        """Translate everything again, with the hooks that are there now. Not from inside the engine."""
        if self._marks.full:
            self.flush()
            return
        self.stale = False
        self._native.flush_code()

    def flush(self) -> None:
        """Forget every page, hook and translated block. Not from inside the engine."""
        self._flushing = True  # taking a hook away makes the engine fetch where it was
        try:
            for handle in self._store_hooks:
                self._native.unhook(handle)
        finally:
            self._flushing = False
        self._pages.clear()
        self._compared.clear()
        self._secrets.clear()
        self.pointers.clear()
        self.mixed.clear()
        self._store_hooks.clear()
        self._marks.clear()
        self.stale = False
        self._native.flush_code()
        self._native.flush_tlb()
