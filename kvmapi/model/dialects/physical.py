"""Guest-physical memory whose slots may have a private half, an inaccessible memfd (memfd.py).

Which half serves an access is the dialect's rule (rule.py). What is done with it there is the guest's: on an SEV guest
an access with the C-bit is decrypted in the arena wherever its page comes from, without it the raw bytes are seen. A
private page's tweak is where the file's page stands in our process, in a range that no caller's address can be in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmapi.model.caller import PAGE
from kvmapi.model.dialects.memfd import Binding
from kvmapi.model.mem.physical import Physical, Refused, Stretch, Window, mark_dirty
from kvmapi.model.mem.private import EncryptedPhysical, ProtectedPhysical

if TYPE_CHECKING:
    from kvmapi.model.attributes import PrivateSet
    from kvmapi.model.caller import Memory
    from kvmapi.model.dialects.memfd import PrivateMemfd
    from kvmapi.model.dialects.rule import Rule
    from kvmapi.model.dialects.vm import DialectVm
    from kvmapi.model.memslots import Memslots, Slot

_PRIVATE = 1 << 63


def tweak_address(file: PrivateMemfd, page: int) -> int:
    """The address that stands for a private page's place in memory."""
    return file.pointer(page) | _PRIVATE


class PrivateSlots(Physical):
    """A VM without encryption: plain ones, and all of them where the machine has no SEV."""

    rule: Rule
    vm: DialectVm
    always_attended = True
    has_stretches = False  # the rule is asked for each page

    def stretch(self, gfn: int) -> Stretch | None:
        return None

    def locate(self, gfn: int, encrypted: bool, write: bool) -> tuple[Window, int, bool]:
        slot = self.slots.find(gfn)
        if slot is None or not self.rule.choose(gfn, slot):
            return super().locate(gfn, encrypted, write)
        if write and slot.readonly:
            raise Refused("mmio", gfn * PAGE)
        if write and slot.dirty is not None:
            mark_dirty(slot, gfn)
        return self._in_private(gfn, slot, encrypted, write)

    def _in_private(self, gfn: int, slot: Slot, encrypted: bool, write: bool) -> tuple[Window, int, bool]:
        window, offset, _ = self._in_gmem(gfn, slot, private=True)
        return window, offset, write or (slot.dirty is None and not slot.readonly)

    def enter(self) -> None:
        super().enter()
        holder = self.vm.lock.holder
        if self.rule.enter(None if holder is None else id(holder)):
            self.tables.clear()


class ProtectedWithErrno(ProtectedPhysical):
    """SW_PROTECTED where a memory fault comes with another errno."""

    def __init__(self, slots: Memslots, memory: Memory, private: PrivateSet, number: int) -> None:
        super().__init__(slots, memory, private)
        self._number = number

    def locate(self, gfn: int, encrypted: bool, write: bool) -> tuple[Window, int, bool]:
        try:
            return super().locate(gfn, encrypted, write)
        except Refused as why:
            if why.kind == "fault":
                why.number = self._number
            raise


class EncryptedPrivateSlots(PrivateSlots, EncryptedPhysical):
    """A VM that is an SEV guest, or may become one."""

    def _in_private(self, gfn: int, slot: Slot, encrypted: bool, write: bool) -> tuple[Window, int, bool]:
        window, offset, storable = super()._in_private(gfn, slot, encrypted, write)
        if self.secure is None:
            return window, offset, storable
        address = self.home(gfn, slot)
        if not encrypted:
            self.secure.evict(address)
            self._raw_pages.add(address // PAGE)
            return window, offset, storable
        if address // PAGE in self._raw_pages:
            self.flush()
        return self._in_frame(self.secure, address, window.pointer + offset, write)

    def home(self, gfn: int, slot: Slot) -> int:
        try:
            private = self.rule.choose(gfn, slot)
        except Refused:
            private = False
        if private and isinstance(slot.gmem, Binding):
            return tweak_address(slot.gmem.file, slot.gmem_page + gfn - slot.gfn)
        return super().home(gfn, slot)
