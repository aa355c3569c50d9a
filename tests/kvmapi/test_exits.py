"""Every exit reason decodes to its own type, and kvm_run cannot make the decoder read elsewhere."""

from __future__ import annotations

import dataclasses
import struct
from errno import EAGAIN, EFAULT, EINTR

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmapi import exit_types_other as other
from kvmapi import exits
from kvmapi.abi import kvm
from kvmapi.abi.run import kvm_run
from kvmapi.errors import ExitError
from kvmapi.words import EHWPOISON


def page(reason: int, union: bytes = b"", size: int = 12288) -> bytearray:
    run = bytearray(size)
    struct.pack_into("<I", run, 8, reason)
    run[32 : 32 + len(union)] = union
    return run


Q = struct.pack
CASES: list[tuple[int, bytes, exits.Exit]] = [
    (0, Q("<Q", 0x7F), exits.UnknownHardware(0x7F)),
    (1, Q("<II", 14, 2), exits.ExceptionExit(14, 2)),
    (2, Q("<BBHIQ", 0, 2, 0xF8, 1, 4096), exits.Io(0xF8, 2, 1, False, b"", 4096)),
    (3, Q("<9Q", 12, 0x1000, 2, 16, 0, 0, 0, 0, 1), exits.Hypercall(12, (0x1000, 2, 16, 0, 0, 0), 0, 1)),
    (4, Q("<I4xQQQ", 3, 0x401000, 1, 0x400), exits.Debug(3, 0x401000, 1, 0x400)),
    (5, b"", exits.Hlt()),
    (6, Q("<Q8sIB", 0xD0000000, b"ABCDEFGH", 4, 1), exits.Mmio(0xD0000000, 4, True, b"ABCD")),
    (7, b"", exits.IrqWindowOpen()),
    (8, b"", exits.Shutdown()),
    (9, Q("<QI", 0x80000021, 3), exits.FailEntry(0x80000021, 3)),
    (10, b"", exits.Intr()),
    (11, b"", exits.SetTpr()),
    (12, Q("<QI", 0x1234, 1), exits.TprAccess(0x1234, True)),
    (13, Q("<BxHI", 4, 0xB2B2, 7), other.S390Sieic(4, 0xB2B2, 7)),
    (14, Q("<Q", 4), other.S390Reset(4)),
    (15, Q("<IIB", 1, 2, 1), other.Dcr(1, 2, True)),
    (16, b"", exits.Nmi()),
    (17, Q("<IIQQ", 2, 2, 5, 6), exits.InternalError(2, (5, 6))),
    (18, Q("<32Q", *range(32)), other.Osi(tuple(range(32)))),
    (19, Q("<11Q", *range(11)), other.PaprHcall(0, 1, tuple(range(2, 11)))),
    (20, Q("<QI", 9, 8), other.S390Ucontrol(9, 8)),
    (21, b"", other.Watchdog()),
    (22, Q("<HHIIIB", 1, 2, 3, 4, 5, 1), other.S390Tsch(1, 2, 3, 4, 5, 1)),
    (23, Q("<I", 5), other.Epr(5)),
    (24, Q("<IIQ", 6, 1, 0x100), exits.SystemEvent(6, (0x100,))),
    (25, Q("<QBxBBH", 1, 2, 3, 4, 5), other.S390Stsi(1, 2, 3, 4, 5)),
    (26, Q("<B", 0x31), exits.IoapicEoi(0x31)),
    (27, Q("<I4xQQQQ", 2, 1, 0, 3, 4), exits.Hyperv(2, (1, 0, 3, 4))),
    (28, Q("<QQ", 1, 2), other.ArmNisv(1, 2)),
    (29, Q("<B7xIIQ", 0, 4, 0x40000ABC, 99), exits.Rdmsr(0x40000ABC, 4)),
    (30, Q("<B7xIIQ", 0, 4, 0x40000ABC, 99), exits.Wrmsr(0x40000ABC, 99, 4)),
    (31, b"", exits.DirtyRingFull()),
    (32, b"", exits.ApResetHold()),
    (33, b"", exits.BusLock()),
    (34, Q("<I4xIIQQ6Q", 1, 1, 3, 29, 0, *range(6)), exits.Xen(1, 1, 3, 29, tuple(range(6)))),
    (35, Q("<8Q", *range(8)), other.RiscvSbi(0, 1, tuple(range(2, 8)))),
    (36, Q("<4Q", 1, 2, 3, 4), other.RiscvCsr(1, 2, 3, 4)),
    (37, Q("<I", 1), exits.Notify(1)),
    (38, Q("<Q8sIB", 0x1000, b"ABCDEFGH", 8, 0), other.LoongarchIocsr(0x1000, 8, False, b"")),
    (39, Q("<QQQ", 8, 0x5000, 4096), exits.MemoryFault(8, 0x5000, 4096, 0)),
    (40, Q("<8Q", *range(8)), exits.Tdx(0, 1, 2, (3, 4, 5, 6, 7))),
    (41, Q("<4Q", 1, 2, 3, 4), other.ArmSea(1, 2, 3, 4)),
    (42, Q("<QQ", 1, 2), other.ArmLdst64b(1, 2)),
    (43, Q("<QQQ", 0x7000, 4, 0), exits.SnpReqCerts(0x7000, 4)),
]


def test_cases_cover_every_reason() -> None:
    assert [reason for reason, _, _ in CASES] == sorted(kvm.EXIT_NAMES)


@pytest.mark.parametrize(("reason", "union", "expected"), CASES, ids=[kvm.exit_name(c[0]) for c in CASES])
def test_reason(reason: int, union: bytes, expected: exits.Exit) -> None:
    got = exits.decode(page(reason, union))
    assert got == expected and type(got) is type(expected)
    assert got.reason == reason and got.name == kvm.EXIT_NAMES[reason]
    assert dataclasses.is_dataclass(got)
    with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
        got.anything = 1  # type: ignore[attr-defined]


def test_out_data_is_copied() -> None:
    run = page(2, struct.pack("<BBHIQ", 1, 1, 0x3F8, 3, 4096))
    run[4096:4099] = b"hey"
    exit = exits.decode(run)
    run[4096:4099] = b"xxx"
    assert isinstance(exit, exits.Io) and exit.data == b"hey" and exit.is_out


def test_an_unknown_reason_keeps_its_bytes() -> None:
    exit = exits.decode(page(4711, bytes(range(8))))
    assert isinstance(exit, exits.Unknown)
    assert (exit.reason, exit.name, exit.raw[:8], len(exit.raw)) == (4711, "UNKNOWN_4711", bytes(range(8)), 256)


def test_errno_decides_first() -> None:
    fault = page(39, struct.pack("<QQQ", 8, 0x5000, 4096))
    for code in (EFAULT, EHWPOISON):
        exit = exits.decode(fault, code)
        assert exit == exits.MemoryFault(8, 0x5000, 4096, code) and exit.private  # type: ignore[attr-defined]
    assert exits.decode(fault, EINTR) == exits.Intr()
    assert exits.decode(fault, EAGAIN) == exits.RunFailed(EAGAIN)
    stale = exits.decode(page(2), EFAULT)
    assert stale == exits.RunFailed(EFAULT) and stale.name == "RUN_FAILED" and "EFAULT" in str(stale)


@pytest.mark.parametrize(
    ("size", "count", "offset"),
    [(1, 1, 12288), (4, 1025, 8192), (1, 0xFFFF_FFFF, 4096), (9, 1, 4096), (0, 1, 4096), (1, 1, 0), (1, 1, 2**64 - 1)],
)
def test_io_outside_the_mapping_is_refused(size: int, count: int, offset: int) -> None:
    with pytest.raises(ExitError, match="IO exit on port 0x10"):
        exits.decode(page(2, struct.pack("<BBHIQ", 1, size, 0x10, count, offset)))


@pytest.mark.parametrize("length", [0, 9, 0xFFFF_FFFF])
def test_mmio_of_an_impossible_length_is_refused(length: int) -> None:
    with pytest.raises(ExitError, match="length"):
        exits.decode(page(6, struct.pack("<Q8sIB", 0, bytes(8), length, 1)))


def test_emulation_failure_shows_the_instruction() -> None:
    union = struct.pack("<IIQB15s", 1, 3, 1, 3, bytes.fromhex("0f0b90") + bytes(12))
    exit = exits.decode(page(17, union))
    assert isinstance(exit, exits.InternalError)
    assert exit.insn_bytes == bytes.fromhex("0f0b90") and exit.suberror_name == "EMULATION"


@given(reason=st.integers(0, 50), union=st.binary(min_size=256, max_size=256), errno=st.sampled_from([0, 0, EFAULT]))
def test_any_bytes_decode_or_are_refused(reason: int, union: bytes, errno: int) -> None:
    run = page(reason, union, 4096 * 2)
    try:
        assert exits.decode(run, errno).name
    except ExitError:
        assert reason in (2, 6, 38)


def test_the_struct_sees_the_same_bytes() -> None:
    run = page(39, struct.pack("<QQQ", 8, 0x5000, 4096))
    view = kvm_run.from_buffer(run)
    assert (view.exit_reason, view.memory_fault.gpa) == (39, 0x5000)
