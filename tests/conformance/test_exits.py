"""KVM_RUN: port I/O, MMIO, HLT and being stopped, with kvm_run's contents, in real mode and in 64-bit mode."""

from __future__ import annotations

import struct
import threading
from errno import EINTR, EINVAL
from typing import Any

import pytest

from kvmapi.abi import ioctls, kvm
from kvmapi.exits import Hlt, Intr, Io, Mmio, Shutdown
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, DATA, MMIO, REAL_CODE, REAL_DATA, LongGuest, RealGuest, code

AT = kvm.PAGE_SIZE  # offset of port data in the mapping, on every kernel so far
VALUE = 0x8877665544332211


def out(port: int, data: bytes, size: int = 0) -> Io:
    return Io(port, size or len(data), len(data) // (size or len(data)), True, data, AT)


OUTS = [
    (code("e610", "out 0x10, al"), 0x10, 1), (code("66e710", "out 0x10, ax"), 0x10, 2), (code("e710", "out 0x10, eax"), 0x10, 4),
    (code("ee", "out dx, al"), 0x1234, 1), (code("66ef", "out dx, ax"), 0x1234, 2), (code("ef", "out dx, eax"), 0x1234, 4),
]  # fmt: skip
INS = [
    (code("e410", "in al, 0x10"), 0x10, 1), (code("66e510", "in ax, 0x10"), 0x10, 2), (code("e510", "in eax, 0x10"), 0x10, 4),
    (code("ec", "in al, dx"), 0x1234, 1), (code("66ed", "in ax, dx"), 0x1234, 2), (code("ed", "in eax, dx"), 0x1234, 4),
]  # fmt: skip
REAL_OUTS = [
    (code("e610", "out 0x10, al", 16), 0x10, 1),
    (code("ef", "out dx, ax", 16), 0x1234, 2),
    (code("66ef", "out dx, eax", 16), 0x1234, 4),
]
REAL_INS = [
    (code("e410", "in al, 0x10", 16), 0x10, 1),
    (code("ed", "in ax, dx", 16), 0x1234, 2),
    (code("66ed", "in eax, dx", 16), 0x1234, 4),
]
HLT = code("f4", "hlt")


@pytest.mark.parametrize(("text", "port", "size"), OUTS)
def test_out(any_host: Any, text: bytes, port: int, size: int) -> None:
    with LongGuest(any_host, text + HLT) as guest:
        guest.regs(rax=VALUE, rdx=0xFFFF1234)
        assert guest.run() == out(port, struct.pack("<Q", VALUE)[:size])
        # KVM skips an OUT when user space comes back; a paravirtual kernel, which emulates it, before it leaves
        assert guest.regs().rip == CODE + (0 if feature(guest, "hardware virtualization") else len(text))
        assert guest.vcpu.kvm_run.exit_reason == kvm.KVM_EXIT_IO
        assert guest.run() == Hlt()
        assert (guest.regs().rip, guest.regs().rax) == (CODE + len(text) + 1, VALUE)


@pytest.mark.parametrize(("text", "port", "size"), INS)
def test_in(any_host: Any, text: bytes, port: int, size: int) -> None:
    with LongGuest(any_host, text + HLT) as guest:
        guest.regs(rax=VALUE, rdx=0x1234)
        asked = guest.run()
        assert asked == Io(port, size, 1, False, b"", AT)
        assert isinstance(asked, Io) and guest.regs().rip == CODE
        guest.vcpu.answer_io(asked, b"\xf1\xf2\xf3\xf4"[:size])
        assert guest.run() == Hlt()
        # 32-bit results clear the upper half; narrower ones leave the rest alone
        assert guest.regs().rax == {1: 0x88776655443322F1, 2: 0x887766554433F2F1, 4: 0xF4F3F2F1}[size]


@pytest.mark.parametrize(("text", "port", "size"), REAL_OUTS)
def test_out_in_real_mode(any_host: Any, text: bytes, port: int, size: int) -> None:
    with RealGuest(any_host, text + HLT) as guest:
        guest.regs(rax=0x44332211, rdx=0x1234)
        assert guest.run() == out(port, b"\x11\x22\x33\x44"[:size])
        assert guest.run() == Hlt() and guest.regs().rip == REAL_CODE + len(text) + 1


@pytest.mark.parametrize(("text", "port", "size"), REAL_INS)
def test_in_in_real_mode(any_host: Any, text: bytes, port: int, size: int) -> None:
    with RealGuest(any_host, text + HLT) as guest:
        guest.regs(rax=0x44332211, rdx=0x1234)
        asked = guest.run()
        assert asked == Io(port, size, 1, False, b"", AT) and isinstance(asked, Io)
        guest.vcpu.answer_io(asked, b"\xf1\xf2\xf3\xf4"[:size])
        assert guest.run() == Hlt()
        assert guest.regs().rax == {1: 0x443322F1, 2: 0x4433F2F1, 4: 0xF4F3F2F1}[size]


def strings(guest: RealGuest | LongGuest) -> tuple[bytes, int]:
    """All bytes that string output brought until HLT, however many items an exit carries, and the exits' number."""
    data, exits = b"", 0
    while isinstance(exit := guest.run(), Io):
        assert exit.is_out and exit.port == 0x77
        data, exits = data + exit.data, exits + 1
    assert exit == Hlt()
    return data, exits


@pytest.mark.parametrize(
    ("text", "count", "size"),
    [
        (code("f36e", "rep outsb"), 5, 1),
        (code("66f36f", "rep outsw"), 5, 2),
        (code("f36f", "rep outsd"), 5, 4),
        (code("6e", "outsb"), 1, 1),
        (code("6f", "outsd"), 1, 4),
    ],
)
def test_outs(any_host: Any, text: bytes, count: int, size: int) -> None:
    with LongGuest(any_host, text + HLT) as guest:
        guest.put(DATA, bytes(range(64)))
        guest.regs(rsi=DATA, rcx=count, rdx=0x77)
        data, exits = strings(guest)
        assert data == bytes(range(count * size)) and 1 <= exits <= count
        regs = guest.regs()
        assert regs.rsi == DATA + count * size and regs.rcx == (0 if 0xF3 in text else count)


def test_outs_backwards(any_host: Any) -> None:
    with LongGuest(any_host, code("fdf36efc f4", "std; rep outsb; cld; hlt")) as guest:
        guest.put(DATA, b"abc")
        guest.regs(rsi=DATA + 2, rcx=3, rdx=0x77)
        assert strings(guest)[0] == b"cba" and guest.regs().rsi == DATA - 1


def test_outs_in_real_mode(any_host: Any) -> None:
    with RealGuest(any_host, code("f36ef4", "rep outsb; hlt", 16)) as guest:
        guest.put(REAL_DATA, b"hello")
        guest.regs(rsi=REAL_DATA, rcx=5, rdx=0x77)
        assert strings(guest)[0] == b"hello" and guest.regs().rcx == 0


@pytest.mark.parametrize(("text", "size"), [(code("f36c", "rep insb"), 1), (code("66f36d", "rep insw"), 2), (code("f36d", "rep insd"), 4)])
def test_ins(any_host: Any, text: bytes, size: int) -> None:
    count, sent = 7, 0
    with LongGuest(any_host, text + HLT) as guest:
        guest.regs(rdi=DATA, rcx=count, rdx=0x77)
        while isinstance(exit := guest.run(), Io):
            length = exit.size * exit.count
            assert not exit.is_out and exit.size == size
            guest.vcpu.answer_io(exit, bytes(range(sent, sent + length)))
            sent += length
        assert exit == Hlt()
        assert guest.get(DATA, count * size + 1) == bytes(range(count * size)) + b"\0" and sent == count * size
        assert guest.regs().rdi == DATA + count * size and guest.regs().rcx == 0


def test_repeat_zero_times(any_host: Any) -> None:
    with LongGuest(any_host, code("f36ef36c f4", "rep outsb; rep insb; hlt")) as guest:
        guest.regs(rcx=0, rsi=DATA, rdi=DATA, rdx=0x77)
        assert guest.run() == Hlt() and guest.regs().rsi == DATA


def test_hlt_leaves_after_itself(any_host: Any) -> None:
    with LongGuest(any_host, HLT + code("f4", "hlt")) as guest:
        assert guest.run() == Hlt() and guest.regs().rip == CODE + 1
        assert guest.run() == Hlt() and guest.regs().rip == CODE + 2


# ---- MMIO
@pytest.mark.parametrize(
    ("text", "length"),
    [
        (code("8803", "mov [rbx], al"), 1),
        (code("668903", "mov [rbx], ax"), 2),
        (code("8903", "mov [rbx], eax"), 4),
        (code("488903", "mov [rbx], rax"), 8),
    ],
)
def test_mmio_write(any_host: Any, text: bytes, length: int) -> None:
    with LongGuest(any_host, text + HLT) as guest:
        guest.regs(rax=VALUE, rbx=MMIO + 0x10)
        assert guest.run() == Mmio(MMIO + 0x10, length, True, struct.pack("<Q", VALUE)[:length])
        assert guest.run() == Hlt() and guest.regs().rip == CODE + len(text) + 1


@pytest.mark.parametrize(
    ("text", "length", "result"),
    [
        (code("8a03", "mov al, [rbx]"), 1, 0x88776655443322F1), (code("668b03", "mov ax, [rbx]"), 2, 0x887766554433F2F1),
        (code("8b03", "mov eax, [rbx]"), 4, 0xF4F3F2F1), (code("488b03", "mov rax, [rbx]"), 8, 0xF8F7F6F5F4F3F2F1),
        (code("0fb603", "movzx eax, byte ptr [rbx]"), 1, 0xF1), (code("480fbf03", "movsx rax, word ptr [rbx]"), 2, 0xFFFFFFFFFFFFF2F1),
    ],
)  # fmt: skip
def test_mmio_read(any_host: Any, text: bytes, length: int, result: int) -> None:
    with LongGuest(any_host, text + HLT) as guest:
        guest.regs(rax=VALUE, rbx=MMIO)
        asked = guest.run()
        assert asked == Mmio(MMIO, length, False, b"") and isinstance(asked, Mmio)
        guest.vcpu.answer_mmio(asked, bytes(range(0xF1, 0xF9))[:length])
        assert guest.run() == Hlt() and guest.regs().rax == result


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        (code("830305", "add dword ptr [rbx], 5"), 15),
        (code("ff03", "inc dword ptr [rbx]"), 11),
        (code("8703", "xchg [rbx], eax"), 0x44332211),
    ],
)
def test_mmio_read_modify_write(any_host: Any, text: bytes, stored: int) -> None:
    with LongGuest(any_host, text + HLT) as guest:
        guest.regs(rax=VALUE, rbx=MMIO + 8)
        asked = guest.run()
        assert asked == Mmio(MMIO + 8, 4, False, b"") and isinstance(asked, Mmio)
        guest.vcpu.answer_mmio(asked, struct.pack("<I", 10))
        assert guest.run() == Mmio(MMIO + 8, 4, True, struct.pack("<I", stored))
        assert guest.run() == Hlt()
        assert guest.regs().rax == (10 if text[0] == 0x87 else VALUE)


def test_mmio_in_real_mode(any_host: Any) -> None:
    with RealGuest(
        any_host,
        code("b800708e d8c60612 005a8a1e 1300f4", "mov ax, 0x7000; mov ds, ax; mov byte ptr [0x12], 0x5a; mov bl, [0x13]; hlt", 16),
    ) as guest:
        guest.vm.set_user_memory_region(0, 0, 0, 0)
        guest.vm.set_user_memory_region(0, 0, 0x10000, guest.hva)  # nothing at 0x70000
        assert guest.run() == Mmio(0x70012, 1, True, b"\x5a")
        asked = guest.run()
        assert asked == Mmio(0x70013, 1, False, b"") and isinstance(asked, Mmio)
        guest.vcpu.answer_mmio(asked, b"\x42")
        assert guest.run() == Hlt() and guest.regs().rbx == 0x42


def test_stores_to_a_readonly_slot_are_mmio(any_host: Any) -> None:
    text = code("8a042500 000001c6 04250000 000107f4", "mov al, [0x1000000]; mov byte ptr [0x1000000], 7; hlt")
    with LongGuest(any_host, text) as guest:
        guest.put(0, b"\x33")
        guest.vm.set_user_memory_region(1, 16 << 20, 1 << 20, guest.hva, kvm.KVM_MEM_READONLY)
        assert guest.run() == Mmio(16 << 20, 1, True, b"\7")
        assert guest.run() == Hlt() and guest.regs().rax & 0xFF == 0x33 and guest.get(0, 1) == b"\x33"


def test_dirty_log_names_the_pages_stored_to(any_host: Any) -> None:
    with LongGuest(any_host, code("c6042500 30000101 8a042500 400001f4", "mov byte ptr [0x1003000], 1; mov al, [0x1004000]; hlt")) as guest:
        guest.vm.set_user_memory_region(1, 16 << 20, 1 << 20, guest.hva + (1 << 20), kvm.KVM_MEM_LOG_DIRTY_PAGES)
        assert guest.run() == Hlt()
        dirty = int.from_bytes(guest.vm.get_dirty_log(1, 256), "little")
        assert dirty & ~(1 << 4) == 1 << 3, "a page that was only read may be named too, where it was mapped writable at once"
        assert not any(guest.vm.get_dirty_log(1, 256))
        assert guest.again() == Hlt()
        assert int.from_bytes(guest.vm.get_dirty_log(1, 256), "little") & ~(1 << 4) == 1 << 3, "dirty again after the log was read"


# ---- leaving
def test_immediate_exit(any_host: Any) -> None:
    with LongGuest(any_host, code("e610f4", "out 0x10, al; hlt")) as guest:
        guest.vcpu.request_exit()
        assert guest.vcpu.run() == EINTR and guest.vcpu.exit(EINTR) == Intr() and guest.regs().rip == CODE
        guest.vcpu.request_exit(False)
        assert isinstance(guest.run(), Io)


def test_immediate_exit_completes_what_was_answered(any_host: Any) -> None:
    """The documented way to finish an instruction without going on: answer, set immediate_exit, run."""
    with LongGuest(any_host, code("e410f4", "in al, 0x10; hlt")) as guest:
        asked = guest.run()
        assert isinstance(asked, Io)
        guest.vcpu.answer_io(asked, b"\x5c")
        guest.vcpu.request_exit()
        assert guest.vcpu.run() == EINTR
        assert guest.regs().rax & 0xFF == 0x5C and guest.regs().rip == CODE + 2


def test_run_takes_no_argument(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        assert guest.vcpu.ioctl_raw(ioctls.KVM_RUN, 1) == -EINVAL


def test_a_spinning_guest_shares_the_machine(any_host: Any) -> None:
    with LongGuest(any_host, code("8a042500 00030084 c074f5f4", "0: mov al, [0x30000]; test al, al; jz 0b; hlt")) as guest:
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(guest.run()))
        thread.start()
        guest.put(DATA, b"\1")
        thread.join(timeout=20)
        assert got == [Hlt()]


def test_two_vcpus_see_each_other(any_host: Any) -> None:
    """vCPU 1 waits for what vCPU 0 stores, and answers; each in a thread of its own."""
    text = code(
        "85ff7514 c6042500 00030001 8a042501 00030084 c074f5f4 8a042500 00030084 c074f5c6 04250100 030001f4",
        "test edi, edi; jnz 1f; mov byte ptr [0x30000], 1; 2: mov al, [0x30001]; test al, al; jz 2b; hlt;"
        " 1: mov al, [0x30000]; test al, al; jz 1b; mov byte ptr [0x30001], 1; hlt",
    )  # fmt: skip
    with LongGuest(any_host, text, vcpus=2) as guest:
        got: dict[int, Any] = {}
        threads = [threading.Thread(target=lambda n=n: got.__setitem__(n, guest.run(n))) for n in (1, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        assert got == {0: Hlt(), 1: Hlt()}


def test_triple_fault_is_shutdown(any_host: Any) -> None:
    with LongGuest(any_host, code("0f0b", "ud2")) as guest:
        sregs = guest.vcpu.get_sregs()
        sregs.idt.limit = 0
        guest.vcpu.set_sregs(sregs)
        assert guest.run() == Shutdown()
