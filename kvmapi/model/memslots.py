"""Memory slots: KVM_SET_USER_MEMORY_REGION and ..REGION2, each check in the kernel's order, and the look-up by GFN.

Invariants: slots of one address space never overlap in GPA; `_by_gfn` is sorted by first GFN; a slot bound to a
guest_memfd is in that file's list of bindings and the other way round. Sizes and GFNs are in 4 KiB pages here, bytes
at the ioctl. Source: kvm-sev-uapi facts §3 (virt/kvm/kvm_main.c, __kvm_set_memory_region and kvm_set_memory_region).
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from kvmapi.abi import kvm
from kvmapi.model.caller import PAGE, USER_TOP, Errno

if TYPE_CHECKING:
    import mmap

USER_SLOTS = 32764  # KVM_USER_MEM_SLOTS on x86: 32767 less three of KVM's own
_MAX_PAGES = (1 << 31) - 1  # KVM_MEM_MAX_NR_PAGES
_V1_FLAGS = kvm.KVM_MEM_LOG_DIRTY_PAGES | kvm.KVM_MEM_READONLY
_U64 = 1 << 64


class PrivateFile(Protocol):
    """What a slot has of the file with its private memory: a guest_memfd, or what RFC dialects have in its place."""

    @property
    def bytes_(self) -> int:
        """Size of the file."""

    @property
    def mappable(self) -> bool:
        """May user space map it, so that all accesses of a VM without private memory go there?"""

    @property
    def closed(self) -> bool:
        """Is nothing bound any more, because user space closed it?"""

    def memory(self) -> mmap.mmap:
        """The whole file in our process."""

    def bind(self, slot: Slot) -> None:
        """A slot has it from now on."""

    def unbind(self, slot: Slot) -> None:
        """No longer."""


@dataclass(slots=True)
class Slot:
    """One memslot. `hva` is the caller's address; `gmem_page` the first page in the bound guest_memfd."""

    id: int
    flags: int
    gfn: int
    pages: int
    hva: int
    gmem: PrivateFile | None = None
    gmem_page: int = 0
    dirty: bytearray | None = field(default=None, repr=False)  # one bit per page, while LOG_DIRTY_PAGES
    backing_key: object = field(default_factory=object, repr=False)  # the same for as long as the memory is: over moves, too

    def hva_of(self, gfn: int) -> int:
        """Caller's address of the page `gfn`."""
        return self.hva + (gfn - self.gfn) * PAGE

    def backing(self) -> PrivateFile | None:
        """The guest_memfd while it lives: closing its fd, and what is mapped of it, unbinds the slot."""
        return self.gmem if self.gmem is not None and not self.gmem.closed else None

    @property
    def readonly(self) -> bool:
        return bool(self.flags & kvm.KVM_MEM_READONLY)


@dataclass(frozen=True, slots=True)
class Request:
    """A decoded region request. Sizes and addresses in bytes; `gmem_fd` and `gmem_offset` are read only with
    KVM_MEM_GUEST_MEMFD.
    """

    slot: int
    flags: int
    gpa: int
    size: int
    hva: int
    gmem_fd: int = -1
    gmem_offset: int = 0
    version: int = 1


class Memslots:
    """All slots of one VM."""

    def __init__(self, *, readonly_allowed: bool) -> None:
        self._readonly_allowed = readonly_allowed
        self._by_id: dict[int, Slot] = {}
        self._by_gfn: list[tuple[int, int]] = []  # (first gfn, id)
        self._last: Slot | None = None

    def __len__(self) -> int:
        return len(self._by_id)

    def all(self) -> list[Slot]:
        """Every slot, in no particular order."""
        return list(self._by_id.values())

    def get(self, slot_id: int) -> Slot | None:
        """By id."""
        return self._by_id.get(slot_id)

    def find(self, gfn: int) -> Slot | None:
        """The slot that holds `gfn`."""
        last = self._last
        if last is not None and 0 <= gfn - last.gfn < last.pages:
            return last
        at = bisect_right(self._by_gfn, (gfn, USER_SLOTS << 16)) - 1
        if at < 0:
            return None
        slot = self._by_id[self._by_gfn[at][1]]
        if gfn - slot.gfn >= slot.pages:
            return None
        self._last = slot
        return slot

    # ---- the checks, in the kernel's order
    def check(self, request: Request) -> tuple[Slot | None, Slot | None]:
        """(old slot, new slot) of a valid request; (None, None) when nothing changes. Raises Errno. Binding, the
        width of physical addresses and the dirty log come later.
        """
        allowed = _V1_FLAGS if self._readonly_allowed else kvm.KVM_MEM_LOG_DIRTY_PAGES
        if request.version == 1 and request.flags & ~_V1_FLAGS:
            raise Errno(errno.EINVAL)
        if request.slot & 0xFFFF >= USER_SLOTS:
            raise Errno(errno.EINVAL)
        if request.version == 2:
            allowed |= kvm.KVM_MEM_GUEST_MEMFD
            if request.flags & kvm.KVM_MEM_GUEST_MEMFD:
                allowed = kvm.KVM_MEM_GUEST_MEMFD  # neither dirty logging nor read-only with private memory
        if request.flags & ~allowed:
            raise Errno(errno.EINVAL)
        if request.size % PAGE or request.gpa % PAGE or request.hva % PAGE:
            raise Errno(errno.EINVAL)
        if request.hva + request.size > USER_TOP:
            raise Errno(errno.EINVAL)
        if request.flags & kvm.KVM_MEM_GUEST_MEMFD and (request.gmem_offset % PAGE or request.gmem_offset + request.size >= _U64):
            raise Errno(errno.EINVAL)
        if request.slot >> 16 or request.gpa + request.size >= _U64 or request.size // PAGE > _MAX_PAGES:
            raise Errno(errno.EINVAL)
        old = self._by_id.get(request.slot)
        if request.size == 0:
            if old is None:
                raise Errno(errno.EINVAL)
            return old, None
        return self._check_change(request, old)

    def _check_change(self, request: Request, old: Slot | None) -> tuple[Slot | None, Slot | None]:
        gfn, pages = request.gpa // PAGE, request.size // PAGE
        if old is not None:
            if request.flags & kvm.KVM_MEM_GUEST_MEMFD or old.flags & kvm.KVM_MEM_GUEST_MEMFD:
                raise Errno(errno.EINVAL)  # bound to a guest_memfd: delete only
            if request.hva != old.hva or pages != old.pages or (request.flags ^ old.flags) & kvm.KVM_MEM_READONLY:
                raise Errno(errno.EINVAL)
            if gfn == old.gfn and request.flags == old.flags:
                return None, None
        if (old is None or gfn != old.gfn) and self.overlaps(gfn, pages, request.slot):
            raise Errno(errno.EEXIST)
        new = Slot(request.slot, request.flags, gfn, pages, request.hva)
        if old is not None:
            new = replace(old, flags=request.flags, gfn=gfn)
        return old, new

    def overlaps(self, gfn: int, pages: int, but: int) -> bool:
        """Does [gfn, gfn+pages) meet a slot other than `but`?"""
        at = max(0, bisect_right(self._by_gfn, (gfn, USER_SLOTS << 16)) - 1)
        for first, slot_id in self._by_gfn[at : at + 3 if but in self._by_id else at + 2]:
            if slot_id != but and first < gfn + pages and gfn < first + self._by_id[slot_id].pages:
                return True
        return False

    # ---- changes, after the checks
    def put(self, slot: Slot) -> None:
        """Insert, or replace the slot of that id."""
        self.drop(slot.id)
        self._by_id[slot.id] = slot
        insort(self._by_gfn, (slot.gfn, slot.id))

    def drop(self, slot_id: int) -> None:
        """Remove a slot if it is there."""
        old = self._by_id.pop(slot_id, None)
        if old is not None:
            del self._by_gfn[bisect_left(self._by_gfn, (old.gfn, slot_id))]
        self._last = None
