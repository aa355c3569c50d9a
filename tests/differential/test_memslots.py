"""Memory slots on the model and on a kernel: the same random changes, and the guest finds the same memory after each.

Slot 0 holds the guest's code and is left alone. Slots 1 to 5 are made, moved, re-flagged and deleted over 64 pages of
guest-physical space and 64 pages of the VMM's memory, so they overlap often. The guest then loads, stores or calls
there: data from a slot, an MMIO exit or a fault says which slot answered.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from kvmapi.abi import caps, ioctls, kvm, structs
from kvmapi.exits import Mmio
from kvmapi.kernel import KernelHost
from kvmapi.model.host import ModelHost
from tests.conformance.snippets import CODE, MIB, PAGE, STACK, LongGuest, address_of, code
from tests.differential.pair import Here, Pair, words_of

LOAD = code("488b03 f4", "mov rax, [rbx]; hlt")
STORE = code("48890b f4", "mov [rbx], rcx; hlt")
CALL = code("ffd3 f4", "call rbx; hlt")
AT = {"load": CODE, "store": CODE + 0x100, "call": CODE + 0x200}
PAGES = 64
BASE = 4 * MIB
LOG, READONLY, GMEM = kvm.KVM_MEM_LOG_DIRTY_PAGES, kvm.KVM_MEM_READONLY, kvm.KVM_MEM_GUEST_MEMFD
RET = 0xC3

slots = st.integers(1, 5)
flags = st.sampled_from([0, 0, 0, LOG, LOG, READONLY, LOG | READONLY, 1 << 3, 1 << 31])
some_pages = st.integers(0, PAGES - 1)
sizes = st.sampled_from([PAGE, PAGE, 2 * PAGE, 4 * PAGE, 16 * PAGE])
words = st.integers(0, (1 << 64) - 1)


def pattern() -> bytes:
    """Each page of the arena begins with its number and has a RET at 0xFF0."""
    return b"".join(struct.pack("<Q", 0x1111000000000000 | n).ljust(0xFF0, b"\x55") + bytes([RET]) * 16 for n in range(PAGES))


class SlotSide(LongGuest):
    """A guest with the three snippets, and an arena for the slots under test."""

    def __init__(self, host: Any, vm_type: int = 0) -> None:
        super().__init__(host, b"", vm_type)
        self.arena = mmap.mmap(-1, PAGES * PAGE)
        self.arena[:] = pattern()
        self.arena_at = address_of(self.arena)
        for name, text in (("load", LOAD), ("store", STORE), ("call", CALL)):
            self.put(AT[name], text)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.arena.close()

    def act(self, name: str, address: int, value: int = 0) -> tuple[Any, ...]:
        """Run a snippet; exits with MMIO reads answered, RAX, and where the guest came to stand."""
        self.regs(rip=AT[name], rsp=STACK, rflags=2, rbx=address, rcx=value, rax=0)
        exits = []
        for _ in range(20):
            error = self.vcpu.run()
            exit = self.vcpu.exit(error)
            exits.append(f"{error} {words_of(exit)}")
            if not isinstance(exit, Mmio):
                break
            if not exit.is_write:
                self.vcpu.answer_mmio(exit, b"\xc3" * exit.length)
        regs = self.regs()
        return tuple(exits), regs.rax, regs.rip, regs.rsp


class Slots(RuleBasedStateMachine):
    """The rules."""

    pair: Pair

    @initialize()
    def start(self) -> None:
        self.pair = Pair(KernelHost(), ModelHost(), SlotSide)

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.pair.close()

    def region(self, version: int, slot: int, flags: int, gpa: int, size: int, hva: Any) -> None:
        name = "KVM_SET_USER_MEMORY_REGION" + ("2" if version == 2 else "")
        self.pair.ioctl("vm", name, slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=hva)

    @rule(version=st.sampled_from([1, 2]), slot=slots, flags=flags, page=some_pages, size=sizes, at=some_pages)
    def create(self, version: int, slot: int, flags: int, page: int, size: int, at: int) -> None:
        at = min(at, PAGES - size // PAGE)
        self.region(version, slot, flags, BASE + page * PAGE, size, Here(at * PAGE))

    @rule(slot=slots, page=some_pages, flags=flags, size=sizes)
    def same_memory_elsewhere(self, slot: int, page: int, flags: int, size: int) -> None:
        """What moves and re-flags hit: a fixed place in memory for each slot and size."""
        self.region(1, slot, flags, BASE + page * PAGE, size, Here(8 * slot * PAGE))

    @rule(version=st.sampled_from([1, 2]), slot=slots, flags=flags)
    def delete(self, version: int, slot: int, flags: int) -> None:
        self.region(version, slot, flags, 0, 0, 0)

    @rule(
        slot=st.sampled_from([1, 2, 32763, 32764, 0xFFFF, 1 << 16, 1 << 16 | 1, 1 << 31]),
        gpa=st.sampled_from([BASE, BASE + 1, BASE + 0x800, 0, 1 << 40, (1 << 64) - PAGE, 1 << 63, 1 << 52]),
        size=st.sampled_from([PAGE, 1, 0xFFF, 1 << 43, 1 << 63, (1 << 64) - PAGE]),  # none that is valid and large
        hva=st.sampled_from([Here(0), Here(1), 0, PAGE, 1 << 47, (1 << 47) - PAGE, (1 << 47) - 2 * PAGE, 1 << 63, (1 << 64) - PAGE]),
        flags=st.sampled_from([0, LOG, GMEM, GMEM | LOG, 1 << 4]),
        version=st.sampled_from([1, 2]),
    )
    def odd(self, slot: int, gpa: int, size: int, hva: Any, flags: int, version: int) -> None:
        self.region(version, slot, flags, gpa, size, hva)
        self.region(version, slot & 0xFFFF or 1, 0, 0, 0, 0)  # do not leave a giant behind

    @rule(slot=st.sampled_from([0, 1, 2, 3, 4, 5, 9, 32764, 1 << 16]))
    def dirty_log(self, slot: int) -> None:
        def get(side: Any) -> Any:
            bits = bytearray(PAGES // 8)
            argument = structs.kvm_dirty_log(slot=slot)
            argument.dirty_bitmap = address_of(bits)
            result = side.vm.ioctl_raw(ioctls.KVM_GET_DIRTY_LOG, ctypes.addressof(argument))
            return result, bytes(bits)

        if slot:
            self.pair.see(f"KVM_GET_DIRTY_LOG(slot={slot})", get, what="KVM_GET_DIRTY_LOG", fields={"slot": slot})

    @rule(slot=slots, first=st.sampled_from([0, 0, 0, 1, 64, 1 << 32]), pages=st.sampled_from([1, 2, 4, 16, 64, 0, 0xFFFFFFFF]), bits=words)
    def clear_dirty_log(self, slot: int, first: int, pages: int, bits: int) -> None:
        def clear(side: Any) -> Any:
            wanted = bytearray(struct.pack("<Q", bits) + bytes(PAGE))
            argument = structs.kvm_clear_dirty_log(slot=slot, num_pages=pages, first_page=first)
            argument.dirty_bitmap = address_of(wanted)
            return side.vm.ioctl_raw(ioctls.KVM_CLEAR_DIRTY_LOG, ctypes.addressof(argument))

        words = f"KVM_CLEAR_DIRTY_LOG(slot={slot}, first_page={first}, num_pages={pages}, bits={bits:#x})"
        self.pair.see(words, clear, what="KVM_CLEAR_DIRTY_LOG")

    @rule(options=st.sampled_from([0, 1, 1, 2, 3, 3, 4]), flags=st.sampled_from([0, 0, 0, 1]))
    def manual_dirty_log(self, options: int, flags: int) -> None:
        def enable(side: Any) -> Any:
            argument = structs.kvm_enable_cap(cap=caps.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, flags=flags)
            argument.args[0] = options
            return side.vm.ioctl_raw(ioctls.KVM_ENABLE_CAP, ctypes.addressof(argument))

        self.pair.see(f"KVM_ENABLE_CAP(MANUAL_DIRTY_LOG_PROTECT2, flags={flags}, {options})", enable, what="KVM_ENABLE_CAP")

    @rule(page=some_pages, offset=st.sampled_from([0, 8, 0x7F8, 0xFE0]))
    def load(self, page: int, offset: int) -> None:
        self.act("load", page * PAGE + offset)

    @rule(page=some_pages, offset=st.sampled_from([0, 8, 0x7F8, 0xFE0]), value=words)
    def store(self, page: int, offset: int, value: int) -> None:
        self.act("store", page * PAGE + offset, value)
        self.pair.see("the VMM's memory", lambda side: bytes(side.arena[:]))

    @rule(page=some_pages)
    def call(self, page: int) -> None:
        self.act("call", page * PAGE + 0xFF0)

    def act(self, name: str, offset: int, value: int = 0) -> None:
        at = BASE + offset
        extra = f", {value:#x}" if name == "store" else ""
        self.pair.see(f"guest: {name} {at:#x}{extra}", lambda side: side.act(name, at, value), what=f"guest {name}")


@pytest.mark.kvm
def test_memslots(drive: Callable[..., None]) -> None:
    drive(Slots, 80, 25)
