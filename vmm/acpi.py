"""ACPI tables of the foreign guest's PC, no more than such guests look for: the processors, and the power management timer.

    0xE0000 RSDT, FADT, FACS, DSDT, MADT, one after another   0xF0000 RSDP, where a guest without UEFI searches for it

The DSDT defines nothing: there are no devices to describe, no power states, no battery. Not for operating systems that need more.

ACPI Specification 6.5, chapter 5; revision 1 of the RSDP and the FADT, which is all that 32-bit addresses need.
"""

from __future__ import annotations

import struct

from vmm import pc, timers

TABLES, RSDP = pc.RESERVED, 0xF0000
LOCAL_APIC, IO_APIC = 0xFEE00000, 0xFEC00000
_OEM, _OEM_TABLE, _CREATOR = b"SEVMM ", b"SEVMMPC ", b"SEVM"
_FADT_SIZE, _FACS_SIZE = 116, 64
_PCAT_COMPAT, _ENABLED = 1, 1
_PROCESSOR, _IO_APIC_ENTRY = 0, 1
_NO_LATENCY = 0xFFFF  # "C2 and C3 are not there"
_WBINVD = 1


def tables(cpus: int) -> dict[int, bytes]:
    """All tables of a machine with `cpus` processors whose APIC ids count from 0, by GPA."""
    at = TABLES + 64  # the RSDT, which names two tables, has room before
    found: dict[int, bytes] = {}

    def place(data: bytes) -> int:
        nonlocal at
        gpa, at = at, -(-(at + len(data)) // 64) * 64
        found[gpa] = data
        return gpa

    facs = place(struct.pack("<4sI", b"FACS", _FACS_SIZE).ljust(_FACS_SIZE, b"\0"))
    dsdt = place(_table(b"DSDT", 1, b""))
    fadt = place(_fadt(facs, dsdt))
    madt = place(_madt(cpus))
    found[TABLES] = _table(b"RSDT", 1, struct.pack("<2I", fadt, madt))
    found[RSDP] = _checked(struct.pack("<8sB6sBI", b"RSD PTR ", 0, _OEM, 0, TABLES), 8)
    return found


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table with the common header of 36 bytes, its checksum right."""
    header = struct.pack("<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, _OEM, _OEM_TABLE, 1, _CREATOR, 1)
    return _checked(header + body, 9)


def _checked(data: bytes, at: int) -> bytes:
    """`data` with the byte at `at` such that all bytes add up to 0."""
    return data[:at] + bytes([-sum(data) & 0xFF]) + data[at + 1 :]


def _fadt(facs: int, dsdt: int) -> bytes:
    """The fixed description: where the timer is, and that nothing else of the fixed hardware is there."""
    fixed = bytearray(_FADT_SIZE)
    struct.pack_into("<2I", fixed, 36, facs, dsdt)
    struct.pack_into("<I", fixed, 76, timers.PM_PORT)
    fixed[91] = 4  # bytes of the timer's register
    struct.pack_into("<2H", fixed, 96, _NO_LATENCY, _NO_LATENCY)
    struct.pack_into("<I", fixed, 112, _WBINVD)
    return _table(b"FACP", 1, bytes(fixed[36:]))


def _madt(cpus: int) -> bytes:
    """Local APICs and the I/O APIC."""
    body = struct.pack("<2I", LOCAL_APIC, _PCAT_COMPAT)
    for cpu in range(cpus):
        body += struct.pack("<4BI", _PROCESSOR, 8, cpu, cpu, _ENABLED)
    body += struct.pack("<4B2I", _IO_APIC_ENTRY, 12, cpus, 0, IO_APIC, 0)
    return _table(b"APIC", 1, body)
