"""Port I/O and MMIO through a GHCB: what user space sees of it, and where the data goes. Source: kvm_fast_pio,
kvm_sev_es_string_io, kvm_sev_es_mmio and setup_vmgexit_scratch of 7.3.
"""

from __future__ import annotations

import ctypes
import os
import threading
from errno import EFAULT, EINVAL
from typing import Any

import pytest

from kvmapi.abi import ghcb as abi
from kvmapi.abi import ioctls, kvm
from kvmapi.exits import Exit, Hlt, Io, Mmio
from kvmapi.model.host import ModelHost
from tests.model.es_code import CELL, GHCB_AT, PRIVATE_END, SHARED, Caller
from tests.model.es_guest import PLAIN, raw

pytestmark = pytest.mark.model
BUFFER = GHCB_AT + 0x800
ROOM = abi.GHCB_SHARED_BUF_SIZE
IN, STRING, REP = abi.SVM_IOIO_TYPE_MASK, abi.SVM_IOIO_STR_MASK, abi.SVM_IOIO_REP_MASK
READ, WRITE = abi.SVM_VMGEXIT_MMIO_READ, abi.SVM_VMGEXIT_MMIO_WRITE
DEVICE = 0xD0000000
OK, BAD_SCRATCH, BAD_INPUT = (0, 0), (2, 3), (2, 5)


@pytest.fixture
def host() -> ModelHost:
    return ModelHost()


@pytest.fixture
def guest(host: ModelHost) -> Any:
    with Caller(host) as guest:
        yield guest


@pytest.fixture
def legacy(host: ModelHost) -> Any:
    """Version 1 of the protocol."""
    with Caller(host, PLAIN) as guest:
        yield guest


def info(port: int, size: int, flags: int = 0) -> int:
    return port << 16 | size << 4 | flags


def io(exit_: Exit) -> tuple[int, int, int, bool, bytes]:
    assert isinstance(exit_, Io), exit_
    return exit_.port, exit_.size, exit_.count, exit_.is_out, exit_.data


def mmio(exit_: Exit) -> tuple[int, bytes, bool]:
    assert isinstance(exit_, Mmio), exit_
    return exit_.phys_addr, exit_.data if exit_.is_write else bytes(exit_.length), exit_.is_write


def feed(guest: Caller, data: bytes) -> None:
    """User space's answer to IN."""
    guest.vcpu.run_map[4096 : 4096 + len(data)] = data


def errno_of_call(guest: Caller) -> int:
    guest.put(CELL, GHCB_AT.to_bytes(8, "little"))
    return raw(guest.vcpu, ioctls.KVM_RUN, 0)


# ---- one IN or OUT
@pytest.mark.parametrize("size", [1, 2, 4])
def test_out(guest: Caller, size: int) -> None:
    guest.fill(abi.SVM_EXIT_IOIO, info(0x3F8, size), rax=0x8877665544332211)
    assert io(guest.call()) == (0x3F8, size, 1, True, bytes.fromhex("11223344")[:size])
    assert guest.run() == Hlt() and guest.answer() == OK and guest.respond_registers()[0] == 0x8877665544332211


@pytest.mark.parametrize(("size", "rax"), [(1, 0x88776655443322AA), (2, 0x887766554433BBAA), (4, 0xDDCCBBAA)])
def test_in_merges_as_the_instruction_does(guest: Caller, size: int, rax: int) -> None:
    guest.fill(abi.SVM_EXIT_IOIO, info(0xFFFF, size, IN), rax=0x8877665544332211)
    assert io(guest.call())[:4] == (0xFFFF, size, 1, False)
    feed(guest, bytes.fromhex("aabbccdd"))
    assert guest.run() == Hlt() and guest.respond_registers()[0] == rax


def test_an_in_that_nobody_answers_is_zero(guest: Caller) -> None:
    feed(guest, b"\xee" * 8)
    guest.fill(abi.SVM_EXIT_IOIO, info(0x60, 4, IN))
    guest.call()
    assert guest.run() == Hlt() and guest.respond_registers()[0] == 0


@pytest.mark.parametrize("flags", [0, IN, STRING, STRING | IN])
def test_a_size_of_nothing_is_nothing(guest: Caller, flags: int) -> None:
    assert guest.ask(abi.SVM_EXIT_IOIO, info(0x80, 0, flags), 4, rax=1, sw_scratch=BUFFER) == OK


def test_sizes_that_no_instruction_has(guest: Caller) -> None:
    guest.fill(abi.SVM_EXIT_IOIO, info(0x80, 7), rax=0x8877665544332211)
    assert errno_of_call(guest) == 0
    run, data = guest.vcpu.kvm_run, guest.vcpu.run_map[4096:4104]
    assert (run.exit_reason, run.io.size, run.io.port, run.io.count) == (kvm.KVM_EXIT_IO, 7, 0x80, 1)
    assert data[:7] == bytes.fromhex("11223344556677")
    guest.run()
    guest.fill(abi.SVM_EXIT_IOIO, info(0x80, 3, IN), rax=0x8877665544332211)
    assert errno_of_call(guest) == 0
    feed(guest, b"\xaa\xbb\xcc\xdd")
    assert guest.run() == Hlt() and guest.respond_registers()[0] == 0x8877665544CCBBAA


# ---- strings
def test_outs_shows_the_whole_string(guest: Caller) -> None:
    guest.put(BUFFER + 16, b"hello, world")
    guest.fill(abi.SVM_EXIT_IOIO, info(0x3F8, 2, STRING | REP), 6, sw_scratch=BUFFER + 16)
    assert io(guest.call()) == (0x3F8, 2, 6, True, b"hello, world")
    assert guest.run() == Hlt() and guest.answer() == OK


def test_ins_fills_the_buffer(guest: Caller) -> None:
    guest.put(BUFFER, b"." * 16)
    guest.fill(abi.SVM_EXIT_IOIO, info(0x60, 4, STRING | IN), 3, sw_scratch=BUFFER + 2)
    assert io(guest.call())[:4] == (0x60, 4, 3, False)
    assert guest.get(BUFFER, 16) == b"." * 16, "nothing before user space has answered"
    feed(guest, b"abcdefghijklmnop")
    assert guest.run() == Hlt() and guest.get(BUFFER, 16) == b"..abcdefghijkl.."


def test_a_string_of_nothing(guest: Caller) -> None:
    assert guest.ask(abi.SVM_EXIT_IOIO, info(0x60, 4, STRING), 0, sw_scratch=1) == OK


@pytest.mark.parametrize(("size", "count"), [(1, 1 << 31), (1, (1 << 64) - 1), (4, 0x20000000), (2, 0x40000000)])
@pytest.mark.parametrize("flags", [STRING, STRING | IN])
def test_a_string_of_too_much_ends_kvm_run(guest: Caller, size: int, count: int, flags: int) -> None:
    guest.fill(abi.SVM_EXIT_IOIO, info(0x60, size, flags), count, sw_scratch=BUFFER)
    assert errno_of_call(guest) == EINVAL
    assert guest.run() == Hlt() and guest.answer() == OK


SCRATCH = [
    (0, 1, BAD_SCRATCH), (BUFFER - 1, 1, BAD_SCRATCH), (BUFFER, ROOM + 1, BAD_SCRATCH), (BUFFER + ROOM, 1, BAD_SCRATCH),
    (BUFFER + ROOM - 1, 2, BAD_SCRATCH), (GHCB_AT, 8, BAD_SCRATCH), (GHCB_AT + 0x1000, 1, BAD_SCRATCH), (SHARED, 1, BAD_SCRATCH),
    ((1 << 64) - 1, 2, BAD_SCRATCH), (1 << 63, 1, BAD_SCRATCH), (BUFFER, ROOM, OK), (BUFFER + ROOM - 1, 1, OK),
]  # fmt: skip


@pytest.mark.parametrize(("scratch", "size", "answer"), SCRATCH, ids=lambda value: hex(value) if isinstance(value, int) else "")
def test_the_buffer_of_version_2_lies_in_the_page(guest: Caller, scratch: int, size: int, answer: tuple[int, int]) -> None:
    guest.fill(abi.SVM_EXIT_IOIO, info(0x60, 1, STRING), size, sw_scratch=scratch)
    exit_ = guest.call()
    assert (exit_ == Hlt()) == (answer == BAD_SCRATCH)
    assert guest.answer() == answer


def test_version_1_takes_a_buffer_anywhere(legacy: Caller) -> None:
    """16 pages of it, shown a page at a time."""
    data = os.urandom(0x10000)
    legacy.put(SHARED + 5, data)
    legacy.fill(abi.SVM_EXIT_IOIO, info(0x60, 2, STRING), 0x8000, sw_scratch=SHARED + 5)
    seen, exit_ = b"", legacy.call()
    for number in range(16):
        port, size, count, is_out, piece = io(exit_)
        assert (port, size, count, is_out) == (0x60, 2, 2048, True), number
        seen += piece
        legacy.put(SHARED + 5, bytes(0x10000))  # KVM has a copy
        exit_ = legacy.run()
    assert exit_ == Hlt() and seen == data and legacy.answer() == OK
    assert not any(legacy.get(SHARED + 5, 0x10000)), "which does not go back"


def test_and_copies_it_back(legacy: Caller) -> None:
    legacy.put(SHARED, b"." * 0x3000)
    legacy.fill(abi.SVM_EXIT_IOIO, info(0x60, 1, STRING | IN), 0x1800, sw_scratch=SHARED + 0xFFF)
    assert io(legacy.call())[:4] == (0x60, 1, 0x1000, False)
    feed(legacy, b"a" * 0x1000)
    assert io(legacy.run())[:4] == (0x60, 1, 0x800, False)
    feed(legacy, b"b" * 0x800)
    assert legacy.get(SHARED, 0x3000) == b"." * 0x3000, "not before the guest goes on"
    assert legacy.run() == Hlt()
    assert legacy.get(SHARED, 0x3000) == b"." * 0xFFF + b"a" * 0x1000 + b"b" * 0x800 + b"." * 0x801


@pytest.mark.parametrize("flags", [STRING, STRING | IN])
def test_but_not_more_than_sixteen_pages_nor_where_nothing_is(legacy: Caller, flags: int) -> None:
    assert legacy.ask(abi.SVM_EXIT_IOIO, info(0x60, 1, flags), 0x10001, sw_scratch=SHARED) == BAD_SCRATCH
    assert legacy.ask(abi.SVM_EXIT_IOIO, info(0x60, 1, flags), 4, sw_scratch=(1 << 64) - 2) == BAD_SCRATCH
    for gpa in (DEVICE, 0x200000 - 1, (1 << 64) - 4096):
        legacy.fill(abi.SVM_EXIT_IOIO, info(0x60, 1, flags), 2, sw_scratch=gpa)
        assert errno_of_call(legacy) == EFAULT, hex(gpa)
        assert legacy.run() == Hlt() and legacy.answer() == OK


def test_a_private_buffer_shows_ciphertext(legacy: Caller) -> None:
    before = legacy.get(PRIVATE_END - 16, 16)
    legacy.fill(abi.SVM_EXIT_IOIO, info(0x60, 1, STRING), 16, sw_scratch=PRIVATE_END - 16)
    assert io(legacy.call())[4] == before != bytes(16)


# ---- MMIO
@pytest.mark.parametrize("size", range(1, 9))
def test_mmio(guest: Caller, size: int) -> None:
    guest.put(BUFFER, b"abcdefghijkl")
    guest.fill(WRITE, DEVICE + 1, size, sw_scratch=BUFFER + 1)
    assert mmio(guest.call()) == (DEVICE + 1, b"bcdefghi"[:size], True)
    assert guest.run() == Hlt() and guest.answer() == OK
    guest.fill(READ, DEVICE + 2, size, sw_scratch=BUFFER + 1)
    assert mmio(guest.call()) == (DEVICE + 2, bytes(size), False)
    guest.vcpu.kvm_run.mmio.data[:] = b"ABCDEFGH"
    assert guest.run() == Hlt() and guest.get(BUFFER, 12) == b"a" + b"ABCDEFGH"[:size] + b"abcdefghijkl"[size + 1 :]


def test_mmio_of_nothing(guest: Caller) -> None:
    assert guest.ask(WRITE, DEVICE, 0, sw_scratch=1) == OK


@pytest.mark.parametrize("size", [9, 4096, 1 << 63])
def test_version_2_moves_eight_bytes_at_most(guest: Caller, size: int) -> None:
    assert guest.ask(WRITE, DEVICE, size, sw_scratch=BUFFER) == BAD_INPUT
    assert guest.ask(READ, DEVICE, 8, sw_scratch=BUFFER + ROOM - 7) == BAD_SCRATCH


def test_version_1_moves_more(legacy: Caller) -> None:
    legacy.put(SHARED, bytes(range(20)))
    legacy.fill(WRITE, DEVICE, 20, sw_scratch=SHARED)
    assert mmio(legacy.call()) == (DEVICE, bytes(range(8)), True)
    assert mmio(legacy.run()) == (DEVICE + 8, bytes(range(8, 16)), True)
    assert mmio(legacy.run()) == (DEVICE + 16, bytes(range(16, 20)), True)
    assert legacy.run() == Hlt() and legacy.answer() == OK
    legacy.fill(READ, DEVICE, 12, sw_scratch=SHARED)
    legacy.call()
    legacy.vcpu.kvm_run.mmio.data[:] = b"ABCDEFGH"
    assert mmio(legacy.run()) == (DEVICE + 8, bytes(4), False)
    legacy.vcpu.kvm_run.mmio.data[:] = b"IJKLMNOP"
    assert legacy.run() == Hlt() and legacy.get(SHARED, 20) == b"ABCDEFGHIJKL" + bytes(range(12, 20))
    assert legacy.ask(READ, DEVICE, 0x10001, sw_scratch=SHARED) == BAD_SCRATCH


def test_mmio_of_memory_is_still_an_exit(guest: Caller) -> None:
    """KVM asks its devices, not the memslots."""
    guest.fill(READ, SHARED, 4, sw_scratch=BUFFER)
    assert mmio(guest.call()) == (SHARED, bytes(4), False)


# ---- devices of the VM
def test_the_apic_answers_itself(host: ModelHost) -> None:
    with Caller(host, irqchip=True) as guest:
        guest.put(BUFFER, b"\xee" * 8)
        call = GHCB_AT
        guest.fill(READ, 0xFEE00030, 4, sw_scratch=BUFFER)
        guest.put(CELL, call.to_bytes(8, "little"))
        stopped = stop_at_halt(guest)
        assert stopped == kvm.KVM_EXIT_INTR and int.from_bytes(guest.get(BUFFER, 4), "little") & 0xFF == 0x14
        assert guest.answer() == OK


def stop_at_halt(guest: Caller) -> int:
    """With an APIC in the kernel HLT does not leave: look at it sleep, and stop it."""
    thread = threading.Thread(target=guest.vcpu.run)
    thread.start()
    file = guest.file()
    for _ in range(2000):
        if file.activity.state == kvm.KVM_MP_STATE_HALTED:
            break
        thread.join(0.005)
    guest.vcpu.kvm_run.immediate_exit = 1
    thread.join(10)
    guest.vcpu.kvm_run.immediate_exit = 0
    return int(guest.vcpu.kvm_run.exit_reason)


def test_an_ioeventfd_takes_the_write(guest: Caller) -> None:
    event = os.eventfd(0)
    try:
        guest.vm.ioeventfd(event, 0x77, 2, kvm.KVM_IOEVENTFD_FLAG_PIO)
        guest.vm.ioeventfd(event, DEVICE, 2)
        assert guest.ask(abi.SVM_EXIT_IOIO, info(0x77, 2), rax=5) == OK
        assert guest.ask(WRITE, DEVICE, 2, sw_scratch=BUFFER) == OK
        assert guest.ask(abi.SVM_EXIT_IOIO, info(0x77, 2, STRING), 3, sw_scratch=BUFFER) == OK
        assert os.eventfd_read(event) == 5, "each element of a string counts"
    finally:
        os.close(event)


def test_a_buffer_whose_memory_goes_away(guest: Caller) -> None:
    """Between the exit and the next entry: the answers are lost, nothing else happens."""
    guest.fill(abi.SVM_EXIT_IOIO, info(0x60, 4, STRING | IN), 3, sw_scratch=BUFFER)
    guest.call()
    guest.vm.set_user_memory_region(0, 0, 0, guest.hva)
    guest.vm.set_user_memory_region(0, 0, GHCB_AT, guest.hva)
    before = guest.get(GHCB_AT, 4096)
    feed(guest, b"x" * 12)
    guest.run()
    assert guest.get(GHCB_AT, 4096) == before
    assert ctypes.sizeof(abi.ghcb) == len(before)
