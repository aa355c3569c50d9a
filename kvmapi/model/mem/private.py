"""Guest-physical memory of VMs with private memory: SW_PROTECTED, where the memory attribute of a page chooses its backing, and
SEV, where the C-bit of the access does (physical.py has the rules, and what all kinds share).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyroaring import BitMap64

from kvmapi.model.attributes import PrivateSet
from kvmapi.model.caller import PAGE, Memory
from kvmapi.model.mem.cipher import PageCipher
from kvmapi.model.mem.physical import Physical, Refused, Stretch, Window, mark_dirty
from kvmapi.model.mem.secure import SecureMemory

if TYPE_CHECKING:
    from kvmapi.model.memslots import Memslots, Slot


class ProtectedPhysical(Physical):
    """SW_PROTECTED: the attribute chooses between guest_memfd and the caller's memory."""

    has_stretches = False  # each page has an attribute

    def __init__(self, slots: Memslots, memory: Memory, private: PrivateSet) -> None:
        super().__init__(slots, memory)
        self.private = private

    def stretch(self, gfn: int) -> Stretch | None:
        return None

    def locate(self, gfn: int, encrypted: bool, write: bool) -> tuple[Window, int, bool]:
        slot = self.slots.find(gfn)
        if self.private.has(gfn):
            if slot is None or slot.gmem is None:
                raise Refused("fault", gfn * PAGE, private=True)
            return self._in_gmem(gfn, slot, private=True)
        if slot is None or (write and slot.readonly):
            raise Refused("mmio", gfn * PAGE)
        if slot.gmem is not None and slot.gmem.mappable:
            return self._in_gmem(gfn, slot, private=False)
        return self._in_caller(gfn, slot, write)


class EncryptedPhysical(Physical):
    """SEV: the C-bit of the access chooses between the decrypted and the raw view of one page.

    A page is reachable through one view at a time. The cached frame stands for the decrypted view; `_raw_pages`
    holds the caller's pages that some vCPU's TLB may still read or write raw.
    """

    def __init__(self, slots: Memslots, memory: Memory) -> None:
        super().__init__(slots, memory)
        self.secure: SecureMemory | None = None  # set by activation (LAUNCH_START)
        self._raw_pages: BitMap64 = BitMap64()

    def activate(self, cipher: PageCipher) -> None:
        """The guest has a key from now on."""
        self.secure = SecureMemory(cipher, self.flush, self._code_changed)
        self.attended = True

    def _code_changed(self) -> None:
        self.code_generation += 1

    def flush(self) -> None:
        super().flush()
        self._raw_pages.clear()
        if self.secure is not None:
            self.secure.translations_gone()

    def stretch(self, gfn: int) -> Stretch | None:
        return super().stretch(gfn) if self.secure is None else None

    def locate(self, gfn: int, encrypted: bool, write: bool) -> tuple[Window, int, bool]:
        secure = self.secure
        if secure is None:
            return super().locate(gfn, encrypted, write)
        slot = self._slot(gfn, write)
        hva = slot.hva_of(gfn)
        if not encrypted:
            secure.evict(hva)
            self._raw_pages.add(hva // PAGE)
            return self._in_caller(gfn, slot, write)
        if hva // PAGE in self._raw_pages:
            self.flush()
        # Ciphertext goes back on the way out, so the caller's page must take a store even if the guest only reads.
        self._check_caller(gfn, slot, write=not slot.readonly)
        if write and slot.dirty is not None:
            mark_dirty(slot, gfn)
        return self._in_frame(secure, hva, self.memory.pointer(hva, PAGE), write)

    def _in_frame(self, secure: SecureMemory, address: int, pointer: int, write: bool) -> tuple[Window, int, bool]:
        """The decrypted page of `address`, which our process sees at `pointer`."""
        frame = secure.frame(address, pointer, write)
        window = self.windows.get(id(secure))
        if window is None:
            window = self._add_window(secure, secure.arena.size, secure.arena.address)
        return window, frame.index * PAGE, write

    def home(self, gfn: int, slot: Slot) -> int:
        """The address that stands for the page's place in memory: its frame's key, and its tweak."""
        return slot.hva_of(gfn)

    def store_word(self, gfn: int, encrypted: bool, index: int, value: int, wide: bool = True) -> None:
        secure, slot = self.secure, self.slots.find(gfn)
        if secure is None or not encrypted or slot is None or slot.readonly:
            super().store_word(gfn, encrypted, index, value, wide)
            return
        self.words(gfn, encrypted, wide)[index] = value  # not through a TLB: the frame is unsaved once, not for good
        secure.mark_unsaved(self.home(gfn, slot))
        if slot.dirty is not None:
            mark_dirty(slot, gfn)

    def populate(self, gfn: int) -> None:
        self._check_caller(gfn, self._slot(gfn, write=False), write=False)  # neither view of the page is touched

    def executed(self, gfn: int) -> None:
        """Translated blocks come from this page: when its frame is given up they must go too."""
        slot = self.slots.find(gfn)
        if self.secure is not None and slot is not None:
            self.secure.mark_executed(self.home(gfn, slot))

    def enter(self) -> None:
        if self._elsewhere and (changes := self.memory.enter()) != self._changes:
            self._remapped(changes)
        if self.secure is not None:
            self.secure.enter()

    def leave(self) -> None:
        if self.secure is not None:
            self.secure.leave()
        if self._elsewhere:
            self.memory.leave()

    def destroy(self) -> None:
        super().destroy()
        if self.secure is not None:
            self.secure.destroy()
            self.secure = None
