"""Guest RAM of a traced process: its memory, seen in our address space at the same time.

The process's mappings are files already (memfd, shm, MAP_SHARED, hugetlbfs), or become files when they are used for a
slot: `convert`, see remap.py. Our views of the process map the same files (painting.py). What can be neither is
mirrored.

Whether the process may access a page, and what is mapped there, is asked when it matters, not remembered: where the
kernel answers single questions (maps.py). `forget` says that something may have changed all the same.

Locks: `_conversion` is held during a conversion, and the model's ioctl runs under it. `_lock` guards the views; a vCPU that
enters may take it, so nothing waits for anyone under it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable

from kvmapi.model.caller import PAGE, USER_TOP, Errno
from vmm.exec.memory import backing as backings
from vmm.exec.memory import copying, views
from vmm.exec.memory.backing import Backing
from vmm.exec.memory.maps import Area, Maps
from vmm.exec.memory.painting import Painting
from vmm.exec.memory.remap import Conversion, Held, Piece, Tracer, from_file
from vmm.exec.memory.watch import Watch
from vmm.exec.pidfd import ending

_STEPS = 2  # conversions in one mapping before it is converted ahead
_GROWTH = 4


class Ram:
    """The guest RAM of the process `tgid`. Usable from any thread. `tracer`: who traces, if anybody does."""

    def __init__(self, tgid: int, tracer: Tracer | None = None) -> None:
        self.tgid = tgid
        self.tracer = tracer
        self.failure: OSError | None = None  # why the last conversion did not work
        self._maps = Maps(tgid)
        self._backings: list[Backing] = []
        self._generation = 0
        self._closed = False
        self._conversion = threading.Lock()
        self._lock = threading.RLock()
        self._watch = Watch(self._maps, self._lock, self._moved)
        self._painting = Painting(tgid, self._maps, self._watch.use)
        self._mirror = self._painting.mirror
        self.watch = self._watch.add_vm
        self._changes = 0

    # ---- converting
    def convertible(self, address: int, size: int) -> bool:
        """Are there parts of [address, address+size) that must be made shared first?"""
        if size <= 0 or address < 0 or address % PAGE or size % PAGE or address + size > USER_TOP:
            return False  # the ioctl will refuse it
        return any(area.private for area in self._maps.walk(address, address + size))

    def convert(self, held: Held, address: int, size: int, action: Callable[[], int]) -> None:
        """Make the private parts of the range shared, call `action` and give its result to the thread that is held. Where
        it cannot be done the memory is mirrored. `action` is called once in any case, in this thread.
        """
        with self._conversion:
            pieces = self._plan(address, address + size) if self.convertible(address, size) else []
            if pieces:
                conversion = Conversion(self.tgid, self._maps, held, pieces, action)
                try:
                    conversion.run(lambda: self._converted(conversion.converted), self.tracer)
                finally:
                    for piece in pieces:
                        piece.backing.let_go()
                self.failure = None if ending(self.tgid, held.tid) else conversion.failure
        if not pieces:
            held.answer(action())
        elif self._closed:
            self._drop_unused()

    def _drop_unused(self) -> None:
        """The process has ended: nothing will ever be converted into backings that were made in vain."""
        if self._conversion.acquire(blocking=False):  # whoever has it will do that
            try:
                backings.drop_unused(self._backings)
            finally:
                self._conversion.release()

    def _converted(self, pieces: list[Piece]) -> None:
        """The process is still held: what a guest has stored to mirrors of its pages goes there."""
        with self._lock:
            self._mirror.leave()
            for piece in pieces:
                self._mirror.drop(piece.start, piece.end)
        self.forget()

    def _plan(self, start: int, end: int) -> list[Piece]:
        """What to convert, into backings that are kept. Where there is no room for a piece it is left out."""
        self._reap()
        pieces = []
        with self._lock:
            for part in self._maps.walk(start, end):
                area = self._maps.area(part.start) if part.private else None
                if area is None or not area.private:
                    continue
                first, last = max(area.start, part.start & -area.page), min(area.end, (part.end + area.page - 1) & -area.page)
                if area.name == b"[stack]" and first == area.start:  # only private memory grows: its lowest page stays so
                    first += PAGE
                    if first == last:
                        continue
                try:
                    chosen = self._backing(area, first, last)
                    before = chosen.conversions(first)
                    if before >= _STEPS and area.name != b"[stack]":
                        ahead = (last - first) * _GROWTH ** min(before - 1, 16)
                        more = max(area.start, first - ahead & -area.page), min(area.end, last + ahead & -area.page)
                        if chosen.serves(*more) and more[0] <= first and last <= more[1]:
                            first, last = more
                except OSError as failure:
                    self.failure = failure
                    continue
                pieces.append(Piece(first, last, area.prot, from_file(area), chosen))
        return pieces

    def _backing(self, area: Area, start: int, end: int) -> Backing:
        for fits, place in ((Backing.serves, (start, end)), (Backing.join, (area.start, area.end))):
            for known in self._backings:
                if fits(known, *place) and known.keep():
                    return known
        made = backings.new(area.start, area.end)
        made.keep()
        self._backings.append(made)
        return made

    def _reap(self) -> None:
        """Free what nobody has any more."""
        with self._lock:
            gone = backings.reap()
            self._backings = [known for known in self._backings if known not in gone]
            self._painting.strip([dead.key for dead in gone])

    # ---- what the model asks
    def pointer(self, address: int, size: int) -> int:
        """Where [address, address+size) of the process stands in ours, in one piece. Raises Errno (ENOMEM)."""
        end = address + size
        with self._lock:
            try:
                view = self._view(address, end)
                self._painting.bring_up_to_date(address, end)
            except OSError as failure:
                raise Errno(failure.errno or errno.ENOMEM) from None
            return view.pointer(address)

    def standing(self, address: int, size: int) -> int | None:
        """Where the range stands in ours, whatever is mapped there; None where there is no room for it."""
        with self._lock, contextlib.suppress(OSError):
            return self._view(address, address + size).pointer(address)
        return None

    def accessible(self, address: int, write: bool) -> bool:
        """May the process read (or write) the page at `address` now? Where it is mirrored it is up to date then."""
        address &= -PAGE
        area = self._maps.area(address)
        if area is None or area.special or not area.allows(write):
            return False
        if area.shared and backings.find(area.device, area.inode) is None and not self._reachable(address):
            return False
        with self._lock:
            try:
                view = self._view(address, address + PAGE)
                self._painting.paint(area)
            except OSError:
                return False
            return view.paint_at(address)[0] != views.MIRROR or self._mirror.add(address)

    def reach(self, address: int, write: bool) -> int:
        """The end of the pages from `address` on that are accessible as it is: all of a mapping of converted memory, which nobody
        can cut short, one page of any other; `address` where it is not.
        """
        if not self.accessible(address, write):
            return address
        area = self._maps.area(address)
        if area is None or not area.shared or backings.find(area.device, area.inode) is None:
            return address + PAGE
        return area.end

    def pinnable(self, address: int, size: int, write: bool, whole: bool) -> bool:
        """May the process read (or write) all of it? With `whole`, no part lies past the end of its file."""
        at, end = address & -PAGE, (address + size + PAGE - 1) & -PAGE
        for area in self._maps.walk(at, end):
            if area.start != at or not area.allows(write):
                return False
            if backings.find(area.device, area.inode) is None and not self._reachable(area.end - PAGE if whole else at):
                return False
            at = area.end
        return at >= end

    def enter(self) -> int:
        """A vCPU is about to run, or the model to read and write guest RAM. Counts changes of mappings after which what is known
        of pages is void.
        """
        self._watch.enter()
        if self._mirror.pages:
            with self._lock:
                self._mirror.enter()
        return self._changes

    def leave(self) -> None:
        """It has."""
        self._watch.leave()
        if self._mirror.pages:
            with self._lock:
                self._mirror.leave()

    def _moved(self, ranges: list[tuple[int, int]]) -> None:
        """The process has mapped something else there."""
        self._changes += 1
        self._painting.forget()
        for start, end in ranges:
            with contextlib.suppress(OSError):
                self._painting.repaint(start, end)

    def _reachable(self, address: int) -> bool:
        """Is there a page behind the mapping? Past the end of its file there is none."""
        return copying.read(self.tgid, address, 1) is not None

    # ---- what the process does
    def discard(self, address: int, size: int) -> bool:
        """The process drops the contents of [address, address+size) (madvise). True: parts of it are converted RAM, and are
        zero now. For the rest the kernel can go on with the call: it does no harm to these parts. But MADV_FREE it
        would refuse for them.
        """
        found = False
        if address % PAGE:
            return False  # the kernel will refuse it
        for area in self._maps.walk(address, min(address + size + PAGE - 1 & -PAGE, USER_TOP)):
            known = backings.find(area.device, area.inode) if area.shared else None
            if known is not None:
                try:
                    with known.kept():
                        known.punch(area.offset, area.end - area.start)
                except OSError:
                    continue
                found = True
        return found

    def file_at(self, address: int) -> tuple[int, int]:
        """Device and inode of the file that is mapped at an address; zeroes where there is none."""
        self._maps.forget()
        area = self._maps.area(address & -PAGE)
        return (area.device, area.inode) if area is not None else (0, 0)

    def forget(self) -> None:
        """Its address space may have changed."""
        self._maps.forget()
        self._watch.doubt()
        with self._lock:
            self._painting.forget()

    def close(self) -> None:
        """The process has ended, or has another program. A vCPU may still be running, or an ioctl be at work: for them there
        are zeros from now on, and the addresses are given back later.
        """
        with self._lock:
            self._closed = True
            gone = self._painting.close()
        self._watch.close()
        self._maps.close()
        self._drop_unused()
        backings.reap()
        views.bury(gone)

    def _view(self, start: int, end: int) -> views.View:
        """The view of the range, as it will be once it is painted. Under the lock. Raises OSError."""
        if self._closed:
            raise OSError(errno.ESRCH, os.strerror(errno.ESRCH))
        if self._maps.generation != self._generation:  # another program: its addresses start afresh
            self._generation = self._maps.generation
            self._backings.clear()
            self._painting.start_afresh()
        return self._painting.view(start, end)
