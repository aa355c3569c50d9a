"""guest_memfd on the model and on a kernel: files made, filled, bound, closed and used by the guest in random order.

Two VM types where the kernel has them: plain (files that can be mapped and start shared) and SW_PROTECTED (private
memory, attributes and KVM_EXIT_MEMORY_FAULT). The guest's accesses show which memory answers.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from kvmapi.abi import ioctls, kvm
from kvmapi.abi import structs as s
from kvmapi.kernel import KernelHost
from kvmapi.memfd import GuestMemfd
from kvmapi.model.host import ModelHost
from tests.conformance.rows import feature
from tests.conformance.snippets import MIB, PAGE, Machine
from tests.differential.pair import File, Here, Pair
from tests.differential.test_memslots import BASE, GMEM, SlotSide

MMAP, SHARED = kvm.GUEST_MEMFD_FLAG_MMAP, kvm.GUEST_MEMFD_FLAG_INIT_SHARED
PRIVATE = kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE
KEEP, PUNCH = 1, 2

files = st.integers(0, 2)
pages = st.integers(0, 15)
slots = st.integers(1, 3)
values = st.integers(0, (1 << 64) - 1)


class FileSide(SlotSide):
    """A guest with its guest_memfds; a closed one stays in the list with fd -1."""

    def __init__(self, host: Any, vm_type: int) -> None:
        super().__init__(host, vm_type)
        self.files: list[GuestMemfd] = []

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.close()
        super().__exit__()

    def create(self, size: int, flags: int) -> int:
        """The errno, or 0 with one more file."""
        argument = s.kvm_create_guest_memfd(size=size, flags=flags)

        fd = self.vm.ioctl_raw(ioctls.KVM_CREATE_GUEST_MEMFD, ctypes.addressof(argument))
        if fd < 0:
            return fd
        self.files.append(GuestMemfd(self.host, fd, size, flags))
        return 0

    def fallocate(self, index: int, mode: int, offset: int, length: int) -> int:
        try:
            self.host.fallocate(self.files[index].fd, mode, offset, length)
        except OSError as error:
            return -(error.errno or 0)
        return 0

    def peek(self, index: int, page: int, store: int | None) -> Any:
        """The first word of a page of a file that starts shared, through a mapping; after `store`, if given."""
        file = self.files[index]
        try:
            with self.host.mmap(file.fd, PAGE, offset=page * PAGE) as window:
                if not file.flags & SHARED:
                    return "mapped"  # touching it is SIGBUS
                if store is not None:
                    window[:8] = struct.pack("<Q", store)
                return struct.unpack("<Q", window[:8])[0]
        except OSError as error:
            return -(error.errno or 0)


class Files(RuleBasedStateMachine):
    """The rules."""

    pair: Pair
    types: tuple[int, ...]
    attributes: bool

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        self.type = data.draw(st.sampled_from(self.types))
        self.pair = Pair(KernelHost(), ModelHost(), lambda host: FileSide(host, self.type))
        self.pair.log.append(f"KVM_CREATE_VM({self.type})")

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.pair.close()

    def count(self) -> int:
        return len(self.pair.model.files)

    # ---- files
    @rule(
        size=st.sampled_from([PAGE, 4 * PAGE, 16 * PAGE, 16 * PAGE, 0, 1, 1 << 63, (1 << 64) - PAGE]),
        flags=st.sampled_from([0, 0, MMAP, MMAP | SHARED, MMAP | SHARED, SHARED, 4, 1 << 63]),
    )
    def create(self, size: int, flags: int) -> None:
        if self.count() < 3:
            self.pair.see(
                f"KVM_CREATE_GUEST_MEMFD(size={size:#x}, flags={flags:#x})", lambda side: side.create(size, flags),
                what="KVM_CREATE_GUEST_MEMFD", fields={"size": size, "flags": flags},
            )  # fmt: skip

    @rule(
        index=files,
        mode=st.sampled_from([KEEP, KEEP, KEEP | PUNCH, KEEP | PUNCH, 0, PUNCH, 4, KEEP | 8, KEEP | 16]),
        page=pages,
        length=st.sampled_from([PAGE, 4 * PAGE, 64 * PAGE, 0, 1, -PAGE, (1 << 63) - PAGE]),
        odd=st.sampled_from([0, 0, 0, 1, -PAGE]),
    )
    def fallocate(self, index: int, mode: int, page: int, length: int, odd: int) -> None:
        offset = page * PAGE + odd
        if index < self.count():
            words = f"fallocate(guest_memfd {index}, mode={mode}, {offset:#x}, {length:#x})"
            self.pair.see(
                words, lambda side: side.fallocate(index, mode, offset, length), what="fallocate",
                fields={"mode": mode, "offset": offset, "length": length},
            )  # fmt: skip

    @rule(index=files, page=pages, store=st.one_of(st.none(), values))
    def peek(self, index: int, page: int, store: int | None) -> None:
        if index < self.count() and self.pair.model.files[index].fd >= 0 and (page + 1) * PAGE <= self.pair.model.files[index].size:
            words = f"mmap(guest_memfd {index}, page {page}){'' if store is None else f' = {store:#x}'}"
            self.pair.see(words, lambda side: side.peek(index, page, store), what="mmap")

    @rule(index=files)
    def close(self, index: int) -> None:
        if index < self.count():
            self.pair.see(f"close(guest_memfd {index})", lambda side: side.files[index].close(), what="close")

    # ---- slots
    @rule(
        slot=slots,
        flags=st.sampled_from([GMEM, GMEM, GMEM, GMEM, 0, GMEM | 1, GMEM | 2]),
        page=pages,
        size=st.sampled_from([PAGE, 4 * PAGE, 16 * PAGE]),
        at=pages,
        index=files,
        offset=st.sampled_from([0, 0, PAGE, 4 * PAGE, 15 * PAGE, 1, -PAGE]),
    )
    def bind(self, slot: int, flags: int, page: int, size: int, at: int, index: int, offset: int) -> None:
        self.pair.ioctl(
            "vm", "KVM_SET_USER_MEMORY_REGION2", slot=slot, flags=flags, guest_phys_addr=BASE + page * PAGE, memory_size=size,
            userspace_addr=Here(at * PAGE), guest_memfd_offset=offset & (1 << 64) - 1, guest_memfd=File(index),
        )  # fmt: skip

    @rule(slot=slots)
    def delete(self, slot: int) -> None:
        self.pair.ioctl("vm", "KVM_SET_USER_MEMORY_REGION2", slot=slot, memory_size=0)

    @rule(
        page=pages,
        size=st.sampled_from([PAGE, PAGE, 4 * PAGE, 16 * PAGE, 0, 1]),
        attributes=st.sampled_from([PRIVATE, PRIVATE, 0, 1, 1 << 63]),
        flags=st.sampled_from([0, 0, 0, 0, 1]),
        odd=st.sampled_from([0, 0, 0, 0, 1]),
    )
    def attribute(self, page: int, size: int, attributes: int, flags: int, odd: int) -> None:
        if self.attributes:
            self.pair.ioctl(
                "vm", "KVM_SET_MEMORY_ATTRIBUTES", address=BASE + page * PAGE + odd, size=size, attributes=attributes, flags=flags
            )

    # ---- the guest
    @rule(page=pages)
    def load(self, page: int) -> None:
        self.act("load", page * PAGE)

    @rule(page=pages, value=values)
    def store(self, page: int, value: int) -> None:
        self.act("store", page * PAGE + 8, value)
        self.act("load", page * PAGE + 8)
        self.pair.see("the VMM's memory", lambda side: bytes(side.arena[: 32 * PAGE]), what="guest store", fields=self.mappable())

    def mappable(self) -> dict[str, bool]:
        """For the rules: is there a file that can be mapped?"""
        return {"mappable": any(file.flags & MMAP for file in self.pair.model.files)}

    def act(self, name: str, offset: int, value: int = 0) -> None:
        words = f"guest: {name} {BASE + offset:#x}{f', {value:#x}' if name == 'store' else ''}"
        self.pair.see(
            words, lambda side: side.act(name, BASE + offset, value), what=f"guest {name}",
            fields=self.mappable(),
        )  # fmt: skip


@pytest.mark.kvm
def test_guest_memfd(drive: Callable[..., None]) -> None:
    with Machine(KernelHost(), slot=False, size=MIB) as machine:
        if not feature(machine, "guest_memfd"):
            pytest.skip("this kernel has no guest_memfd")
        types = (0, 1) if feature(machine, "SW_PROTECTED") else (0,)
        attributes = feature(machine, "memory attributes")
    drive(Files, 90, 25, types=types, attributes=attributes)
