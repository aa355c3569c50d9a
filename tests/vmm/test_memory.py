"""Guest memory: slots in KVM, the map and the process together, and nothing left of them afterwards."""

import errno
from typing import Any

import pytest

from kvmapi.system import System
from vmm.checks import GpaRange
from vmm.conversion import EXPLICIT, ConversionFailed, Converter
from vmm.gpamap import GpaMap
from vmm.memory import BadAddress, GuestMemfdBacking, GuestMemory

MIB = 1 << 20
pytestmark = pytest.mark.usefixtures("no_leaks")


def test_reads_and_writes_cross_slots_that_touch(any_host: Any) -> None:
    with System(any_host) as kvm, kvm.create_vm() as vm:
        memory = GuestMemory(vm, GpaMap())
        memory.add_slot(0, 0, MIB)
        memory.add_slot(1, MIB, MIB)
        memory.write(MIB - 3, b"abcdef")
        assert memory.read(MIB - 4, 8) == b"\0abcdef\0"
        assert memory.hva(MIB + 5) == memory.slots[1].hva + 5
        assert memory.slot_at(2 * MIB) is None
        for gpa, size in ((2 * MIB - 1, 2), (2 * MIB, 1), (1 << 60, 1)):
            with pytest.raises(BadAddress):
                memory.read(gpa, size)
        with pytest.raises(BadAddress):
            memory.write(2 * MIB - 1, b"ab")
        assert memory.read(2 * MIB - 1, 1) == b"\0", "nothing is written when not all of it fits"
        with pytest.raises(BadAddress):
            memory.hva(MIB - 1, 2)
        memory.close()
        memory.close()
        assert list(memory.map.ranges()) == []


def test_a_slot_that_cannot_be_made_leaves_nothing(any_host: Any) -> None:
    with System(any_host) as kvm, kvm.create_vm() as vm:
        memory = GuestMemory(vm, GpaMap())
        memory.add_slot(0, 0, MIB)
        with pytest.raises(ValueError, match="overlaps"):
            memory.add_slot(1, 0, MIB)
        with pytest.raises(OSError, match="EINVAL"):
            memory.add_slot(1 << 15, 4 * MIB, MIB)  # no such slot number: KVM refuses after the memory was made
        assert memory.map.slot_of(4 * MIB) is None
        memory.close()


def test_a_sparse_slot_costs_nothing(any_host: Any) -> None:
    with System(any_host) as kvm, kvm.create_vm() as vm:
        memory = GuestMemory(vm, GpaMap())
        memory.add_slot(0, 0, 64 << 30)
        memory.write((64 << 30) - 4, b"last")
        memory.close()


def test_sw_protected_memory_converts_and_punches(model_host: Any) -> None:
    with System(model_host) as kvm, kvm.create_vm(1) as vm:
        map = GpaMap()
        memory = GuestMemory(vm, map)
        memory.add_slot(0, 0, MIB, guest_memfd=True)
        memory.add_slot(1, MIB, MIB)
        converter = Converter(map, GuestMemfdBacking(vm, memory))
        assert memory.holds_private(GpaRange(0, MIB))
        assert not memory.holds_private(GpaRange(MIB - 0x1000, 0x2000))
        converter.convert(GpaRange(0x1000, 0x2000), True, EXPLICIT, 0)
        converter.convert(GpaRange(MIB - 0x1000, 0x2000), True, EXPLICIT, 0)
        converter.convert(GpaRange(0x2000, 0x1000), False, EXPLICIT, 0)
        assert [(r.gpa, r.size) for r in map.ranges() if r.state == "private"] == [(0x1000, 0x1000), (MIB - 0x1000, 0x1000), (MIB, 0x1000)]
        memory.close()


def test_a_punch_that_fails_puts_the_attributes_back(model_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with System(model_host) as kvm, kvm.create_vm(1) as vm:
        map = GpaMap()
        memory = GuestMemory(vm, map)
        slot = memory.add_slot(0, 0, MIB, guest_memfd=True)
        converter = Converter(map, GuestMemfdBacking(vm, memory))
        converter.convert(GpaRange(0x1000, 0x1000), True, EXPLICIT, 0)
        calls: list[tuple[int, int, int]] = []
        real = vm.set_memory_attributes

        def watched(gpa: int, size: int, attributes: int, flags: int = 0) -> None:
            calls.append((gpa, size, attributes))
            real(gpa, size, attributes, flags)

        def failing(offset: int, length: int) -> None:
            raise OSError(errno.EINTR, "interrupted")

        monkeypatch.setattr(vm, "set_memory_attributes", watched)
        monkeypatch.setattr(slot.guest_memfd, "punch_hole", failing)
        with pytest.raises(ConversionFailed, match="punch") as caught:
            converter.convert(GpaRange(0, 0x3000), False, EXPLICIT, 0)
        assert caught.value.code == -errno.EINTR
        assert calls == [(0, 0x3000, 0), (0, 0x1000, 0), (0x1000, 0x1000, 8), (0x2000, 0x1000, 0)]
        assert map.is_private(0x1000)
        assert converter.total == 1
        memory.close()
