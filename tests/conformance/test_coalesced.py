"""Coalesced I/O: writes that stay in the VM's ring (virt/kvm/coalesced_mmio.c)."""

from __future__ import annotations

import ctypes
import struct
from errno import EFAULT, EINVAL
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, irq, kvm
from kvmapi.exits import Hlt, Io
from kvmapi.exits import Mmio as MmioExit
from kvmapi.vcpu import Vcpu
from tests.conformance.rows import OK, expect_errno
from tests.conformance.snippets import MMIO, LongGuest, Machine, code

PAGE = kvm.PAGE_SIZE
RING = kvm.KVM_COALESCED_MMIO_PAGE_OFFSET * PAGE
ENTRY = struct.Struct("<QII8s")
ENTRIES = (PAGE - 8) // ENTRY.size
PORT = 0x80
STORES_AND_OUTS = code(
    "b9000100 d0b80500 00008901 66890148 8901e780 e680f4",
    "mov ecx, 0xd0000100; mov eax, 5; mov [rcx], eax; mov [rcx], ax; mov [rcx], rax; out 0x80, eax; out 0x80, al; hlt",
)
FOREVER = code("8901 ffc0 ebfa", "mov [rcx], eax; inc eax; jmp $-4")


def zone(machine: Machine, request: int, address: int, size: int, pio: int = 0) -> int:
    """The errno of KVM_REGISTER_COALESCED_MMIO or its opposite."""
    argument = irq.kvm_coalesced_mmio_zone(address, size)
    argument.pio = pio
    return expect_errno(machine.vm.ioctl_raw(request, ctypes.addressof(argument)))


def register(machine: Machine, address: int, size: int, pio: int = 0) -> int:
    return zone(machine, ioctls.KVM_REGISTER_COALESCED_MMIO, address, size, pio)


def unregister(machine: Machine, address: int, size: int, pio: int = 0) -> int:
    return zone(machine, ioctls.KVM_UNREGISTER_COALESCED_MMIO, address, size, pio)


def words(vcpu: Vcpu) -> tuple[int, int]:
    """`first` and `last`."""
    first, last = struct.unpack_from("<II", vcpu.run_map, RING)
    return first, last


def take(vcpu: Vcpu) -> list[tuple[int, bytes, int]]:
    """Empty the ring: (address, data, pio) of each entry."""
    first, last = words(vcpu)
    found = []
    while first != last:
        address, length, pio, data = ENTRY.unpack_from(vcpu.run_map, RING + 8 + first * ENTRY.size)
        found.append((address, data[:length], pio))
        first = (first + 1) % ENTRIES
    struct.pack_into("<I", vcpu.run_map, RING, first)
    return found


def exits(guest: LongGuest) -> list[bytes]:
    """The data of the write exits until HLT."""
    found = []
    while not isinstance(exit := guest.run(), Hlt):
        assert isinstance(exit, Io | MmioExit), exit
        found.append(bytes(exit.data))
    return found


FIVE = b"\x05\0\0\0"
ALL = [FIVE, FIVE[:2], FIVE + bytes(4), FIVE, FIVE[:1]]
ADDRESS = MMIO + 0x100
CASES = [
    ("none", [], []),
    ("memory", [(ADDRESS, 8, 0)], [0, 1, 2]),
    ("a narrow zone", [(ADDRESS, 4, 0)], [0, 1]),
    ("another address", [(ADDRESS + 8, 8, 0)], []),
    ("from below", [(MMIO, 0x104, 0)], [0, 1]),
    ("ports", [(PORT, 4, 1)], [3, 4]),
    ("one port", [(PORT, 1, 1)], [4]),
    ("ports that are addresses", [(PORT, 4, 0)], []),
    ("both", [(ADDRESS, 4, 0), (ADDRESS, 8, 0), (PORT, 1, 1)], [0, 1, 2, 4]),
    ("a zone that wraps", [(ADDRESS, 4, 0), (2**64 - 4, 8, 0)], [0, 1]),
]


@pytest.mark.parametrize(("zones", "kept"), [row[1:] for row in CASES], ids=[row[0] for row in CASES])
def test_what_is_kept(any_host: Any, zones: list[tuple[int, int, int]], kept: list[int]) -> None:
    with LongGuest(any_host, STORES_AND_OUTS) as guest:
        assert guest.vm.check_extension(caps.KVM_CAP_COALESCED_MMIO) == kvm.KVM_COALESCED_MMIO_PAGE_OFFSET
        assert guest.vm.check_extension(caps.KVM_CAP_COALESCED_PIO) == 1
        for one in zones:
            assert register(guest, *one) == OK
        assert exits(guest) == [data for at, data in enumerate(ALL) if at not in kept]
        places = [(ADDRESS, 0)] * 3 + [(PORT, 1)] * 2
        assert take(guest.vcpu) == [(places[at][0], ALL[at], places[at][1]) for at in kept]


@pytest.mark.parametrize("start", [0, 1, ENTRIES // 2, ENTRIES - 1])
def test_a_full_ring_exits(any_host: Any, start: int) -> None:
    with LongGuest(any_host, FOREVER) as guest:
        assert register(guest, MMIO, 4) == OK
        struct.pack_into("<II", guest.vcpu.run_map, RING, start, start)
        guest.regs(rcx=MMIO, rax=7)
        for round_ in range(2):
            base = 7 + round_ * ENTRIES
            assert guest.run() == MmioExit(MMIO, 4, True, (base + ENTRIES - 1).to_bytes(4, "little"))
            first, last = words(guest.vcpu)
            assert (last + 1) % ENTRIES == first
            assert [int.from_bytes(data, "little") for _, data, _ in take(guest.vcpu)] == list(range(base, base + ENTRIES - 1))


@pytest.mark.parametrize("last", [ENTRIES, ENTRIES + 1, 2**31, 2**32 - 1])
def test_a_ring_that_user_space_spoiled(any_host: Any, last: int) -> None:
    with LongGuest(any_host, FOREVER) as guest:
        assert register(guest, MMIO, 4) == OK
        struct.pack_into("<II", guest.vcpu.run_map, RING, 0, last)
        guest.regs(rcx=MMIO, rax=7)
        assert guest.run() == MmioExit(MMIO, 4, True, b"\x07\0\0\0") and words(guest.vcpu) == (0, last)


def test_taking_zones_off(any_host: Any) -> None:
    with LongGuest(any_host, STORES_AND_OUTS) as guest:
        for one in ((ADDRESS, 4), (ADDRESS, 8), (MMIO, 0x200), (PORT, 4, 1)):
            assert register(guest, *one) == OK
        assert unregister(guest, MMIO, 0x201) == OK, "no zone holds all of it"
        assert unregister(guest, ADDRESS, 8) == OK, "two zones do"
        assert unregister(guest, PORT, 4, 0) == OK, "no ports"
        assert exits(guest) == [ALL[2]] and len(take(guest.vcpu)) == 4
        assert unregister(guest, ADDRESS, 4) == OK and unregister(guest, PORT, 1, 1) == OK
        guest.regs(rip=guest.regs().rip - len(STORES_AND_OUTS))
        assert exits(guest) == ALL and take(guest.vcpu) == []


def test_refusals(any_host: Any) -> None:
    with Machine(any_host) as machine:
        for call in (register, unregister):
            assert call(machine, MMIO, 8, 2) == EINVAL and call(machine, MMIO, 8, 2**32 - 1) == EINVAL
        for request in (ioctls.KVM_REGISTER_COALESCED_MMIO, ioctls.KVM_UNREGISTER_COALESCED_MMIO):
            assert expect_errno(machine.vm.ioctl_raw(request, 8)) == EFAULT
        assert unregister(machine, MMIO, 8) == OK


def test_one_ring_for_all_vcpus(any_host: Any) -> None:
    with LongGuest(any_host, STORES_AND_OUTS) as guest:
        other = guest.add_vcpu()
        assert register(guest, ADDRESS, 8) == OK
        assert len(exits(guest)) == 2
        assert words(other) == words(guest.vcpu) == (0, 3)
        assert len(take(other)) == 3 and words(guest.vcpu) == (3, 3)
