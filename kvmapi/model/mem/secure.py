"""Encrypted guest pages: ciphertext in the VMM's memory, plaintext in the arena while the guest runs.

A private page has one home, the caller's memory, and holds ciphertext there. When a vCPU touches it through a C-bit
mapping, it is decrypted into a frame; when the vCPU leaves KVM_RUN, changed frames are encrypted back. This is a
write-back cache, and it is what hardware looks like from outside:

- while the guest is stopped the VMM sees ciphertext only, and the current one;
- what the VMM wrote over a page is noticed at the next entry (the ciphertext differs from what we left) and reads as
  garbage;
- a page is cached under one alias at a time: touching it with the C-bit clear writes it back first and shows the
  ciphertext.

Frames are keyed by the caller's page address, which stands for the system physical address. Everything here runs
under the VM's engine lock.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable

from kvmapi.model.mem.arena import FRAMES, PAGE, Arena
from kvmapi.model.mem.cipher import ROOM, PageCipher
from kvmapi.model.mem.compare import Comparison

_KEEP = 256  # frames kept over an exit: each costs 0.3 µs at the next entry
_HOT = 64  # frames that stay writable over an exit: each costs a checksum at every exit


class Frame:
    """One page of plaintext. `home` is the caller's page as our process sees it, and `cipher` what we last left or found there.

    `writable`: some TLB may hold a writable entry. Then, or where the model wrote, it may differ from the ciphertext: it is among the
    unsaved ones of its `SecureMemory`, and stays there as long as it is writable.
    """

    __slots__ = ("address", "checksum", "cipher", "compared", "executed", "home", "index", "plain", "writable")

    def __init__(self, index: int, address: int, home: memoryview, plain: memoryview) -> None:
        self.index = index
        self.address = address
        self.home = home
        self.plain = plain
        self.cipher = bytearray(home)
        self.checksum = 0
        self.writable = self.executed = False
        self.compared = False  # at each entry: since the first exit


def page_view(pointer: int) -> memoryview:
    """The page at `pointer` in our process, as bytes."""
    return memoryview((ctypes.c_ubyte * PAGE).from_address(pointer)).cast("B")


class SecureMemory:
    """The encrypted pages of one VM. `on_flush` must throw away every vCPU's translations; `on_code_change` every
    translated block.
    """

    def __init__(self, cipher: PageCipher, on_flush: Callable[[], None], on_code_change: Callable[[], None]) -> None:
        self.cipher = cipher
        self.arena = Arena()
        self._keyed = False  # the vault is open for us, from the first page that needs the key until nobody is inside
        self._frames: dict[int, Frame] = {}
        self._homes = Comparison()  # of all frames but the new ones: what stands at home, and `cipher`
        self._new: list[Frame] = []  # since a vCPU entered; many do not live until it leaves
        self._unsaved: set[Frame] = set()
        self._free = list(range(FRAMES - 1, -1, -1))
        self._inside = 0
        self._on_flush = on_flush
        self._on_code_change = on_code_change

    # ---- entering and leaving
    def enter(self) -> None:
        """A vCPU enters KVM_RUN: notice what the VMM changed meanwhile."""
        self._inside += 1
        if self._inside == 1:
            self.arena.open_door()
            if not self._homes.same():
                self._load_changed()

    def _load_changed(self) -> None:
        for frame in self._frames.values():
            if bytes(frame.home) != frame.cipher:
                frame.cipher[:] = frame.home
                self._decrypt(frame)
                if frame.executed:
                    self._on_code_change()

    def leave(self) -> None:
        """A vCPU leaves KVM_RUN: every changed page is ciphertext in the caller's memory before this returns."""
        try:
            if self._unsaved:
                for frame in list(self._unsaved):
                    self._store(frame)
            if len(self._frames) > _KEEP:
                self.evict_all()
            elif len(self._unsaved) > _HOT:
                self._on_flush()
            if self._new:
                self._compare_new()
        finally:
            self._inside -= 1
            if self._inside == 0:
                self.close()

    def _compare_new(self) -> None:
        for frame in self._new:
            if self._frames.get(frame.address) is frame:
                self._homes.put(frame.address, ctypes.addressof(ctypes.c_char.from_buffer(frame.home)), frame.cipher)
                frame.compared = True
        self._new.clear()

    def save_all(self) -> None:
        """No vCPU runs: every page is ciphertext in the caller's memory, and none is cached, when this returns."""
        self.arena.open_door()
        self.evict_all()
        self.close()

    def close(self) -> None:
        """Nobody is inside: neither plaintext nor keys can be reached."""
        self.arena.close_door()
        if self._keyed:
            self._keyed = False
            self.cipher.vault.__exit__()

    def _unlock(self) -> None:
        """The key is needed: once opened, the vault stays open until the last vCPU leaves."""
        if not self._keyed:
            self.cipher.vault.__enter__()
            self._keyed = True

    # ---- during a run
    def frame(self, address: int, pointer: int, write: bool) -> Frame:
        """The frame of the caller's page at `address` (our process sees it at `pointer`), decrypted."""
        frame = self._frames.get(address)
        if frame is None:
            if not self._free:
                self.evict_all()
            index = self._free.pop()
            frame = Frame(index, address, page_view(pointer), self.arena.view[index * PAGE : (index + 1) * PAGE])
            self._decrypt(frame)
            self._frames[address] = frame
            self._new.append(frame)
        if write:
            frame.writable = True
            self._unsaved.add(frame)
        return frame

    def mark_executed(self, address: int) -> None:
        """The engine translated code from this page."""
        frame = self._frames.get(address)
        if frame is not None:
            frame.executed = True

    def mark_unsaved(self, address: int) -> None:
        """The model itself wrote to this frame."""
        frame = self._frames.get(address)
        if frame is not None:
            self._unsaved.add(frame)

    def evict(self, address: int) -> None:
        """Write one page back and forget its plaintext: it is about to be seen another way."""
        frame = self._frames.pop(address, None)
        if frame is not None:
            if frame.compared:
                self._homes.drop(address)
            self._drop(frame)
            self._on_flush()

    def evict_all(self) -> None:
        """Write everything back and forget every plaintext."""
        for frame in self._frames.values():
            self._drop(frame)
        self._frames.clear()
        self._new.clear()
        self._homes.clear()
        self._on_flush()

    def translations_gone(self) -> None:
        """Every vCPU's TLB was flushed: a page is written again only through `frame`."""
        for frame in self._unsaved:  # as all are that may be written
            frame.writable = False

    def destroy(self) -> None:
        """Deactivation: pages stay ciphertext for ever. What was given up before was wiped then."""
        self.arena.open_door()
        for frame in self._frames.values():
            frame.plain[:] = bytes(PAGE)
        self.arena.work.hidden[:] = bytes(ROOM)
        self._frames.clear()
        self._new.clear()
        self._homes.clear()
        self._unsaved.clear()
        self.close()
        self.arena.destroy()

    # ---- one page
    def _decrypt(self, frame: Frame) -> None:
        self._unlock()
        # From secret memory to secret memory: a copy on the heap would stay readable there after it is freed.
        frame.plain[:] = self.cipher.decrypt_part(frame.address, frame.cipher, self.arena.work)
        frame.checksum = zlib.crc32(frame.plain)

    def _store(self, frame: Frame) -> None:
        # A checksum decides whether the page changed. A guest that forges a collision only leaves older ciphertext in
        # the VMM's view.
        if not frame.writable:
            self._unsaved.discard(frame)
        checksum = zlib.crc32(frame.plain)
        if checksum != frame.checksum:
            self._unlock()
            frame.checksum = checksum
            frame.cipher[:] = self.cipher.encrypt_part(frame.address, frame.plain, self.arena.work)
            frame.home[:] = frame.cipher

    def _drop(self, frame: Frame) -> None:
        if frame in self._unsaved:
            self._store(frame)
            self._unsaved.discard(frame)
        if frame.executed:
            self._on_code_change()
        frame.plain[:] = bytes(PAGE)
        self._free.append(frame.index)
