"""Who gets an access of a guest whose slots have a private half: the one rule of the RFC dialects.

Two questions, answered by different people. What the *page* is: private while it is populated (v6), while its GFN is
registered (v7) or has the attribute (later). What the *access* is: hardware would say so, but SEV does not tell KVM the
C-bit of an access, so the guest marks ranges by hypercall, or KVM takes every access for what the page is. Where the
two answers differ, KVM asks user space: a memory fault exit.

With KVM_CAP_UNMAPPED_PRIVATE_MEM (UPM mode) an SEV guest's MAP_GPA_RANGE hypercalls say what its accesses are. Pages of
private slots are private until the guest says otherwise, others are shared; a page of a slot without private half that
the guest made private has nothing behind it: a memory fault, too.

Everything here runs with the VM's engine lock held. Sources: kvm_faultin_pfn in the series' versions; V3 of the
selftests' series for the bitmap per slot; the cover letter thread of its SEV port for UPM mode.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmapi.abi import dialects as d
from kvmapi.abi import kvm
from kvmapi.model.attributes import PrivateSet
from kvmapi.model.caller import PAGE, Errno
from kvmapi.model.dialects.memfd import Binding
from kvmapi.model.mem.physical import Refused

if TYPE_CHECKING:
    from kvmapi.model.dialects.vm import DialectVm
    from kvmapi.model.memslots import Slot

_MARKS = d.KVM_MARK_GPA_RANGE_ENC_ACCESS | d.KVM_CLR_GPA_RANGE_ENC_ACCESS


class Range:
    """Where one vCPU's accesses are private: [first, end), but for what it has cleared since."""

    __slots__ = ("cleared", "end", "first")

    def __init__(self) -> None:
        self.first = self.end = 0
        self.cleared = PrivateSet()

    def __contains__(self, gfn: int) -> bool:
        return self.first <= gfn < self.end and gfn not in self.cleared


class Rule:
    """The rule of one VM. `registered`: the GFNs that user space declared private, where that counts."""

    def __init__(self, vm: DialectVm, dialect: d.Dialect, registered: PrivateSet) -> None:
        self._vm = vm
        self._decides, self._accesses = dialect.decides, dialect.accesses
        self._number = dialect.fault[2]
        self.registered = registered
        self.unmapped = False  # KVM_CAP_UNMAPPED_PRIVATE_MEM
        self.may_be_pending = dialect.pending
        self._pending = {True: PrivateSet(), False: PrivateSet()}  # what the guest asked to become private, or shared
        self._ranges: dict[int, Range] = {}  # per vCPU: where its accesses are private
        self._current: Range | None = None
        self._shared, self._private = PrivateSet(), PrivateSet()  # what the guest said of its accesses, VM-wide

    # ---- the answer
    def choose(self, gfn: int, slot: Slot) -> bool:
        """Is the access served from private memory? Refused where page and access differ."""
        file = slot.gmem
        if not isinstance(file, Binding):
            if self._ordinary_is_private(gfn):
                raise Refused("fault", gfn * PAGE, private=True, number=self._number)
            return False
        if self.may_be_pending:
            for private, pages in self._pending.items():
                if gfn in pages:
                    raise Refused("fault", gfn * PAGE, private=private, number=self._number)
        page = slot.gmem_page + gfn - slot.gfn
        private = file.file.has(page) if self._decides == "population" else gfn in self.registered
        access = self._access(gfn, private)
        if access != private or (private and page * PAGE >= file.bytes_):
            raise Refused("fault", gfn * PAGE, private=access, number=self._number)
        return private

    def _ordinary_is_private(self, gfn: int) -> bool:
        """Is the access private, though the slot has no private half?"""
        if self._upm:
            return gfn in self._private
        return self._decides == "attribute" and not self.may_be_pending and gfn in self.registered

    def _access(self, gfn: int, private: bool) -> bool:
        """Is this access of a private slot's page private, as far as KVM knows? `private`: the page is."""
        if self._upm or self._accesses == "slot":
            return gfn not in self._shared
        if self._accesses == "vcpu" and self._current is not None:
            return gfn in self._current
        return private

    @property
    def _upm(self) -> bool:
        return self.unmapped and self._vm.sev.active

    # ---- whose access it is
    def add_vcpu(self, key: int) -> None:
        """A vCPU whose kick flag has this id is there."""
        self._ranges[key] = Range()

    def enter(self, key: int | None) -> bool:
        """Accesses come from this vCPU now, or from none; does it matter to what is known of guest tables?"""
        before, self._current = self._current, self._ranges.get(key) if key is not None and self._accesses == "vcpu" else None
        return before is not self._current

    # ---- what the guest says
    def hypercall(self, gfn: int, pages: int, within: int, attributes: int) -> bool:
        """MAP_GPA_RANGE of pages that do not wrap, of which so many are `within` the physical addresses: does it go on to user
        space? Errno(EINVAL) for the guest.
        """
        mark, clear = bool(attributes & d.KVM_MARK_GPA_RANGE_ENC_ACCESS), bool(attributes & _MARKS)
        if self._accesses == "vcpu" and clear and not self._upm:
            self._mark_for_vcpu(gfn, within, mark)
            return False
        if not pages:
            raise Errno(errno.EINVAL)
        private = mark or bool(attributes & kvm.KVM_MAP_GPA_RANGE_ENCRYPTED)
        if self._upm:
            for first, count in self._in_slots(gfn, within):
                self._say(first, count, private)
        elif self._accesses == "slot":
            slot = self._vm.slots.find(gfn)
            if slot is None or not isinstance(slot.gmem, Binding) or slot.pages - (gfn - slot.gfn) < pages:
                raise Errno(errno.EINVAL)
            self._say(gfn, pages, private)
        elif self.may_be_pending:
            for first, count in self._in_slots(gfn, within):
                self._pending[private].set_range(first, count, True)
                self._pending[not private].set_range(first, count, False)
                self._vm.physical.flush_range(first, count)
        return not (clear and (self._upm or self._accesses == "slot"))

    def _mark_for_vcpu(self, gfn: int, pages: int, mark: bool) -> None:
        """MARK replaces the vCPU's one range, CLR takes from it."""
        current = self._current
        if current is None:
            return
        if mark:
            current.first, current.end, current.cleared = gfn, gfn + pages, PrivateSet()
        else:
            for first, count in self._in_slots(gfn, pages):
                current.cleared.set_range(first, count, True)
        self._vm.physical.flush()

    def _in_slots(self, gfn: int, pages: int) -> list[tuple[int, int]]:
        """What of [gfn, gfn+pages) is memory. A guest that names other addresses costs nothing."""
        found = []
        for slot in self._vm.slots.all():
            first, end = max(gfn, slot.gfn), min(gfn + pages, slot.gfn + slot.pages)
            if first < end:
                found.append((first, end - first))
        return found

    def _say(self, gfn: int, pages: int, private: bool) -> None:
        self._private.set_range(gfn, pages, private)
        self._shared.set_range(gfn, pages, not private)
        self._vm.physical.flush_range(gfn, pages)

    def settle(self, gfn: int, pages: int) -> None:
        """User space completed, or refused, what the guest had asked for of these pages."""
        for asked in self._pending.values():
            asked.set_range(gfn, pages, False)
        self._vm.physical.flush_range(gfn, pages)

    def slot_made(self, slot: Slot) -> None:
        """A slot's bitmap begins empty."""
        self._shared.set_range(slot.gfn, slot.pages, False)
        self._private.set_range(slot.gfn, slot.pages, False)
