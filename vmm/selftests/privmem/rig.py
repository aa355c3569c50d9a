"""The machine of the RFC suite: a `Bench` with a private memslot, whose pages are converted as one dialect or the other does it.

    slot 10 at 0xB0000000   shared half: memory of this process; private half: a memfd with MFD_INACCESSIBLE; all private at the start
    upm-v6                  a page is private while it is allocated in the memfd: fallocate, punch
    upm-v7                  a page is private while its GPA is registered: REG_REGION, UNREG_REGION; punching only frees memory

The guest's requests (MAP_GPA_RANGE) and its accesses of the wrong kind (memory faults) are answered by converting what they name, and
each conversion is noted, so that a case can say how many there must have been.

In UPM mode (KVM_CAP_UNMAPPED_PRIVATE_MEM) the guest's own memory is such a slot too, populated by the launch. Its shared half is wiped
before the guest starts, so the guest can only be running from its private memory. What has to be shared from the start (the ucall page, the
page about page tables) is told to the guest in a measured page, and the guest asks for it.

Invariant: what the host reads of private memory is nothing; every check of the host looks at the shared half.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Self

from kvmapi.abi import dialects as d
from kvmapi.abi import kvm
from kvmapi.dialects import PrivateMemfd, Vm
from kvmapi.exit_types import Exit, Hypercall, MemoryFault, Mmio
from vmm import boot
from vmm.config import MachineConfig
from vmm.machine import SLOT_LOW
from vmm.selftests.bench import Bench
from vmm.selftests.checks import check_equal, fail
from vmm.selftests.privmem.guest import RANGES_PAGE, SIZE_GPA, TABLES_PAGE, TEST_GPA
from vmm.selftests.privmem.shared import PAGE_2M, PAGE_4K, SharedMemory
from vmm.selftests.tables import TABLES_END, TABLES_MORE

if TYPE_CHECKING:
    from kvmapi.vcpu import Vcpu
    from vmm.launch import SevLaunch
    from vmm.memory import MemorySlot

SLOT_TEST, SLOT_GHCBS, SLOT_REST = 10, 11, 12
FIRST_SHARED = (boot.SHARED_PAGE, TABLES_PAGE)
"""Pages of the guest's own memory that are shared from its first instructions on."""

EXPOSED = 0x40_0000_0000
"""Where the guest sees its own page tables, one after the other: an address that nothing else is mapped at."""

REGION = "upm-v7"
"""The dialect in which registered regions decide."""

EXPLICIT, IMPLICIT = "explicit", "implicit"


class Rig(Bench):
    """`page`: bytes of a page of the shared half. `guarded`: nobody may touch the shared half while the guest's memory is private."""

    def __init__(self, config: MachineConfig, page: int = PAGE_4K, guarded: bool = False, upm: bool = False) -> None:
        """Build and launch; raises as `Bench`."""
        self.size = PAGE_2M if page == PAGE_2M else 2 * PAGE_4K
        self.guarded, self.upm = guarded, upm
        self.by_region = config.dialect == REGION
        self.shared = SharedMemory(self.size, page)
        self.conversions: list[tuple[str, bool, int, int]] = []
        self.own: list[tuple[MemorySlot, PrivateMemfd]] = []  # the guest's own memory in UPM mode
        try:
            super().__init__(config, prepare=lambda _: self._prepare_memory())
        except BaseException:
            self.shared.close()
            raise
        self.handlers.append(self._convert_or_answer)

    def close(self) -> None:
        """Release everything, the VM before the memory that is its. Safe to call twice."""
        super().close()
        self.shared.close()

    def __enter__(self) -> Self:
        return self

    @property
    def dialect_vm(self) -> Vm:
        """The VM, as what a machine with a dialect has."""
        if not isinstance(self.vm, Vm):
            raise TypeError(f"a VM of the mainline dialect: {self.vm!r}")
        return self.vm

    # -- building ------------------------------------------------------------------------------------------------------------------------

    def _add_memory(self) -> None:
        """In UPM mode memory is private slots: the same memfds as ever are their shared halves. GHCBs are memory that is only shared,
        because a guest cannot ask for anything before it has one.
        """
        if not self.upm:
            super()._add_memory()
            return
        self.vm.enable_cap(d.KVM_CAP_UNMAPPED_PRIVATE_MEM)
        start = 0
        ghcbs = boot.ghcb_pages(self.type, self.config.vcpus)
        if ghcbs:
            self._add_own(SLOT_LOW, 0, ghcbs.start)
            start = ghcbs.start + len(ghcbs) * boot.PAGE
            self.memory.add_slot(SLOT_GHCBS, ghcbs.start, start - ghcbs.start)
        self._add_own(SLOT_REST if ghcbs else SLOT_LOW, start, self.config.memory - start)
        for gpa in FIRST_SHARED if self.by_region else ():
            self.dialect_vm.unregister_private(gpa, boot.PAGE)

    def _add_own(self, id: int, gpa: int, size: int) -> None:
        """A slot of the guest's own memory, with a private half; where that is said by region, all of it is private."""
        slot = self.memory.add_slot(id, gpa, size)
        memfd = self._new_memfd(size)
        self.vm.set_user_memory_region(id, gpa, 0, slot.hva)
        self.dialect_vm.set_private_region(id, gpa, size, slot.hva, memfd.fd)
        if self.by_region:
            self.dialect_vm.register_private(gpa, size)
        self.own.append((slot, memfd))

    def _prepare_memory(self) -> None:
        """The test slot, and what the guest has to know."""
        if not self.features & boot.FEATURE_HYPERCALL:
            fail("KVM_CAP_EXIT_HYPERCALL does not offer MAP_GPA_RANGE")
        self.memfd = self._new_memfd(self.size)
        self.dialect_vm.set_private_region(SLOT_TEST, TEST_GPA, self.size, self.shared.address, self.memfd.fd)
        self._to_private(self.memfd, TEST_GPA, 0, self.size)
        if self.guarded:
            self.shared.forbid()
        self.tables.map(TEST_GPA, TEST_GPA, self.size, private=False)
        self.tables.map(SIZE_GPA, SIZE_GPA, PAGE_4K, private=False)
        self.tables.map(TABLES_PAGE, TABLES_PAGE, PAGE_4K, private=False)
        self.memory.write(TABLES_PAGE, self._expose_tables())

    def _load(self) -> dict[int, bytes | memoryview]:
        contents = super()._load()
        ranges = b"".join(struct.pack("<3Q", gpa, 1, 0) for gpa in FIRST_SHARED if self.upm)
        contents[RANGES_PAGE] = ranges.ljust(boot.PAGE, b"\0")  # the guest believes it, so it is measured
        self.memory.write(RANGES_PAGE, contents[RANGES_PAGE])
        return dict(sorted(contents.items()))

    def _expose_tables(self) -> bytes:
        """Map every page of the tables there are at `EXPOSED`; returns what the guest is told of them: count, first GVA, page size,
        and each page as entries hold it, which is with the C-bit. The tables that this mapping itself needs are not shown.
        """
        first = len(boot.page_tables(self.config.memory, self.c_mask))
        shown = list(range(boot.TABLES, boot.TABLES + first, boot.PAGE))
        shown += sorted(gpa for gpa in self.tables.pages if TABLES_MORE <= gpa < TABLES_END)
        for number, gpa in enumerate(shown):
            self.tables.map(EXPOSED + number * boot.PAGE, gpa, boot.PAGE, private=True)
        return struct.pack(f"<{3 + len(shown)}Q", len(shown), EXPOSED, boot.PAGE, *(gpa | self.c_mask for gpa in shown))

    def _new_memfd(self, size: int) -> PrivateMemfd:
        memfd = PrivateMemfd.create(self.host, size)
        self._stack.callback(memfd.close)
        return memfd

    # -- conversions ---------------------------------------------------------------------------------------------------------------------

    def make_all_private(self) -> None:
        """The test memory, without the guest having asked."""
        self._to_private(self.memfd, TEST_GPA, 0, self.size)

    def make_all_shared(self) -> None:
        """The test memory, without the guest having asked; what was private is gone."""
        self._to_shared(self.memfd, TEST_GPA, 0, self.size)

    def _convert_or_answer(self, vcpu: Vcpu, exit: Exit) -> bool:
        """The exits of this suite; True = answered."""
        match exit:
            case Hypercall(nr=number, args=(gpa, pages, attributes, *_)):
                check_equal(number, kvm.KVM_HC_MAP_GPA_RANGE, "the hypercall's number")
                self._convert(EXPLICIT, gpa, pages * PAGE_4K, bool(attributes & kvm.KVM_MAP_GPA_RANGE_ENCRYPTED))
                vcpu.answer_hypercall(0)
            case MemoryFault(gpa=gpa, size=size):
                check_equal((gpa % PAGE_4K, size, exit.errno), (0, PAGE_4K, 0), "a memory fault's offset in its page, its size and errno")
                self._convert(IMPLICIT, gpa, size, exit.private)
            case Mmio(phys_addr=gpa, length=8, is_write=False) if gpa == SIZE_GPA:
                vcpu.answer_mmio(exit, self.size.to_bytes(8, "little"))
            case _:
                return False
        return True

    def _convert(self, cause: str, gpa: int, size: int, private: bool) -> None:
        """What the guest asks for, in the test memory or, in UPM mode, in its own."""
        own = next(((slot, memfd) for slot, memfd in self.own if slot.gpa <= gpa and gpa + size <= slot.end), None)
        if own is not None:
            memfd, offset = own[1], gpa - own[0].gpa
        else:
            if not TEST_GPA <= gpa < gpa + size <= TEST_GPA + self.size:
                fail(f"the guest wants a conversion of [{gpa:#x}, {gpa + size:#x}), which is not test memory")
            memfd, offset = self.memfd, gpa - TEST_GPA
            if self.guarded and private:
                self.shared.forbid()
            self.conversions.append((cause, private, gpa, size))
        (self._to_private if private else self._to_shared)(memfd, gpa, offset, size)
        if self.guarded and not private and memfd is self.memfd:
            self.shared.allow()

    def _to_private(self, memfd: PrivateMemfd, gpa: int, offset: int, size: int) -> None:
        if self.by_region:
            self.dialect_vm.register_private(gpa, size)
        else:
            memfd.allocate(offset, size)

    def _to_shared(self, memfd: PrivateMemfd, gpa: int, offset: int, size: int) -> None:
        if self.by_region:
            self.dialect_vm.unregister_private(gpa, size)
        memfd.punch_hole(offset, size)

    # -- what the host expects -----------------------------------------------------------------------------------------------------------

    def expect_conversions(self, *expected: tuple[str, bool]) -> None:
        """These and no others: (EXPLICIT, private?) is one of all the test memory, (IMPLICIT, private?) is one of each page in turn."""
        wanted: list[tuple[str, bool, int, int]] = []
        for cause, private in expected:
            piece = self.size if cause == EXPLICIT else PAGE_4K
            wanted += [(cause, private, TEST_GPA + at, piece) for at in range(0, self.size, piece)]
        check_equal(len(self.conversions), len(wanted), "conversions")
        check_equal(self.conversions, wanted, "conversions (cause, private, GPA, bytes)")

    # -- UPM mode ------------------------------------------------------------------------------------------------------------------------

    def _launch(self, sev: SevLaunch, contents: dict[int, bytes | memoryview]) -> None:
        super()._launch(sev, contents)
        if self.upm:
            self._wipe_shared_half()

    def _wipe_shared_half(self) -> None:
        """The image, tables and stacks that the host wrote and the firmware took over: the guest must not need them any more."""
        kept = self.memory.read(TABLES_PAGE, boot.PAGE)
        for slot, _ in self.own:
            slot.map[:] = bytes(slot.size)
        self.memory.write(TABLES_PAGE, kept)

    def expect_own_memory_unseen(self) -> None:
        """Nothing that the guest wrote since has come into the shared half, except what it shared."""
        for slot, _ in self.own:
            for gpa in range(slot.gpa, slot.end, boot.PAGE):
                if gpa not in FIRST_SHARED:
                    page = self.memory.read(gpa, boot.PAGE)
                    check_equal(page.count(0), boot.PAGE, f"zero bytes in the shared half of the page at {gpa:#x}")
