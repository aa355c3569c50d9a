"""The PC's memory map, tables and first registers; ACPI tables as a guest checks them; the local APIC where the host has none."""

import struct
from itertools import pairwise
from typing import Any

import pytest

from tests.vmm import ports
from vmm import acpi, boot, pc, timers
from vmm.apic import Apic
from vmm.devices import Devices
from vmm.foreign import Pc
from vmm.image import LINUX64, MULTIBOOT, Image, Segment


@pytest.mark.parametrize("memory", [16 << 20, 64 << 20, 3 << 30, 5 << 30])
def test_the_memory_map_is_in_order_and_leaves_out_the_hole(memory: int) -> None:
    entries = pc.memory_map(memory)
    assert all(low[0] + low[1] <= high[0] for low, high in pairwise(entries))
    ram = [(gpa, size) for gpa, size, type in entries if type == pc.E820_RAM]
    slots = boot.memory_layout(memory)
    assert all(any(slot <= gpa and gpa + size <= slot + length for slot, length in slots) for gpa, size in ram)
    assert sum(size for _, size in ram) == memory - (1 << 20) + pc.EBDA


def test_what_we_put_in_memory_is_where_no_guest_looks_for_room() -> None:
    for protocol in (MULTIBOOT, LINUX64):
        setup = bytes(0x80)
        image = Image("image", 0x100000, (Segment(0x100000, 4, b"code"),), protocol=protocol, setup=setup)
        for gpa, data in Pc(image, 64 << 20, 64, b"x" * 1023).pages().items():
            in_area = gpa >= pc.AREA_START and gpa + len(data) <= pc.EBDA
            assert in_area or (gpa >= pc.RESERVED and gpa + len(data) <= pc.ONE_MIB), hex(gpa)


def test_the_identity_tables_map_4_gib() -> None:
    tables = pc.identity_tables()
    for gva in (0, 0x100234, 0x3FFFFFFF, 0xC0000000, 0xFFFFFFFF):
        (pml4e,) = struct.unpack_from("<Q", tables, 0)
        (pdpte,) = struct.unpack_from("<Q", tables, (pml4e & ~0xFFF) - pc.TABLES + 8 * (gva >> 30))
        (leaf,) = struct.unpack_from("<Q", tables, (pdpte & ~0xFFF) - pc.TABLES + 8 * (gva >> 21 & 511))
        assert pml4e & pdpte & leaf & 3 == 3
        assert leaf & ~0x1FFFFF | gva & 0x1FFFFF == gva
        assert leaf & 0x80
    assert struct.unpack_from("<Q", tables, 8) == (0,)


def test_the_descriptors_are_the_boot_protocols() -> None:
    assert struct.unpack("<4Q", pc.gdt()) == (0, 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF)
    assert struct.unpack("<4Q", pc.gdt(long=True))[2] == 0x00AF9B000000FFFF


def scan(memory: dict[int, bytes], cpus: int) -> dict[bytes, bytes]:
    """ACPI tables by signature, found as a guest finds them: RSDP on a 16-byte boundary below 1 MiB, then the RSDT."""
    (rsdp,) = [data for gpa, data in memory.items() if data.startswith(b"RSD PTR ") and gpa % 16 == 0 and 0xE0000 <= gpa < 0x100000]
    assert sum(rsdp[:20]) & 0xFF == 0
    rsdt = memory[struct.unpack_from("<I", rsdp, 16)[0]]
    pointers = struct.unpack(f"<{(len(rsdt) - 36) // 4}I", rsdt[36:])
    found = {b"RSDT": rsdt} | {memory[gpa][:4]: memory[gpa] for gpa in pointers}
    for table in found.values():
        assert sum(table) & 0xFF == 0
        assert struct.unpack_from("<I", table, 4) == (len(table),)
    return found


@pytest.mark.parametrize("cpus", [1, 4, 64])
def test_acpi_names_the_processors_and_the_timer(cpus: int) -> None:
    memory = acpi.tables(cpus)
    ends = sorted((gpa, gpa + len(data)) for gpa, data in memory.items())
    assert all(low[1] <= high[0] for low, high in pairwise(ends)), "tables overlap"
    found = scan(memory, cpus)
    fadt, madt = found[b"FACP"], found[b"APIC"]
    assert struct.unpack_from("<I", fadt, 76) == (timers.PM_PORT,)
    facs, dsdt = struct.unpack_from("<2I", fadt, 36)
    assert facs % 64 == 0 and memory[facs][:4] == b"FACS" and memory[dsdt][:4] == b"DSDT"
    assert struct.unpack_from("<I", madt, 36) == (0xFEE00000,)
    at, ids = 44, []
    while at < len(madt):
        if madt[at] == 0:
            assert struct.unpack_from("<I", madt, at + 4) == (1,)
            ids.append(madt[at + 3])
        at += madt[at + 1]
    assert ids == list(range(cpus))


def test_a_local_apic_knows_whose_it_is_and_keeps_its_registers() -> None:
    apic = Apic()
    assert apic.read(0xFEE00020, 4, vcpu=3) == b"\0\0\0\3"
    apic.write(0xFEE000F0, b"\xff\1\0\0", vcpu=0)
    assert apic.read(0xFEE000F0, 4, vcpu=0) == b"\xff\1\0\0"
    assert apic.read(0xFEE000F0, 4, vcpu=1) == bytes(4)
    apic.write(0xFEE00300, b"\0\x14\0\0", vcpu=0)
    assert apic.read(0xFEE00300, 4) == b"\0\4\0\0", "an IPI is never on its way"
    apic.write(0xFEE00020, b"\xff" * 4)
    assert apic.read(0xFEE00020, 4) == bytes(4), "the id stays"
    assert apic.holds(0xFEE00FFF) and not apic.holds(0xFEE01000) and not apic.holds(0xFEDFFFFF)


def test_a_guest_cannot_fill_our_memory_through_the_apic() -> None:
    apic = Apic()
    for gpa in range(0xFEE00000, 0xFEE01000):
        apic.write(gpa, b"\1\2\3\4")
    assert len(apic._registers) <= 256


@pytest.mark.parametrize("on", ["in the kernel", "nowhere"])
def test_the_devices_are_on_their_ports(on: str) -> None:
    machine = Pc(Image("image", 0, (Segment(0x100000, 4, b"code"),), protocol=MULTIBOOT), 64 << 20, 2, b"")
    machine.in_kernel = on == "in the kernel"
    devices = Devices(boot.HOLE, boot.MSR, foreign=True)
    machine.add_devices(devices)
    ports.write(devices.ports.find(0x3F8), 0x3F8, ord("x"))
    assert devices.console.text() == "x"
    assert ports.read(devices.ports.find(0x3FD), 0x3FD) == b"\x60"
    ports.write(devices.ports.find(0x510), 0x510, 5, 2)
    assert ports.read(devices.ports.find(0x511), 0x511) == b"\2"
    assert ports.read(devices.ports.find(0x608), 0x608, 4) != b"\xff" * 4
    assert devices.mmio.read(0xFEE00020, 4, 1) == (b"\0\0\0\1" if on == "nowhere" else b"\xff" * 4)
    devices.mmio.write(0xFF00FFFC, b"word")
    assert devices.mmio.read(0xFF00FFFC, 4) == b"word"
    before = devices.mmio.unknown
    devices.mmio.write(0xFF00FFFE, b"word")
    assert devices.mmio.read(0xFED00000, 2) == b"\xff\xff"
    assert devices.mmio.unknown == before + 2
    ports.write(devices.ports.find(0x2003), 0x2003, 1)  # no VM here: a line that leads nowhere


def test_x2apic_is_taken_back_where_nobody_answers_for_it() -> None:
    from kvmapi.abi.vcpu import kvm_cpuid_entry2

    machine = Pc(Image("image", 0, (Segment(0x100000, 4, b"code"),), protocol=MULTIBOOT), 64 << 20, 1, b"")
    for in_kernel in (False, True):
        machine.in_kernel = in_kernel
        entry: Any = kvm_cpuid_entry2(function=1, ecx=0xFFFFFFFF)
        machine.adjust_cpuid([entry])
        assert bool(entry.ecx & 1 << 21) is in_kernel
        assert bool(entry.ecx & 1 << 24) is in_kernel
