"""What only the model's CPU can get wrong: hypercalls, code that changes, kicks, atomics, slots that go away.

The kernel here cannot be asked about hypercall exits, so these follow the kernel's source (arch/x86/kvm/x86.c).
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EFAULT, EINTR
from typing import Any

import pytest

from kvmapi.abi import caps, kvm
from kvmapi.exits import Exit, Hlt, Hypercall, InternalError, MemoryFault, Mmio, RunFailed
from tests.conformance.snippets import CODE, DATA, MIB, MMIO, PAGE, LongGuest, code

pytestmark = pytest.mark.model
U64 = 1 << 64
VMMCALL = code("0f01d9f4", "vmmcall; hlt")
HC = kvm.KVM_HC_MAP_GPA_RANGE


class HcGuest(LongGuest):
    """A guest whose MAP_GPA_RANGE exits."""

    def __init__(self, host: Any, text: bytes = VMMCALL) -> None:
        super().__init__(host, text)
        self.vm.enable_cap(caps.KVM_CAP_EXIT_HYPERCALL, 1 << HC)

    def call(self, gpa: int, pages: int, attributes: int = 16, number: int = HC) -> Exit:
        return self.again(rax=number, rbx=gpa, rcx=pages, rdx=attributes)


@pytest.mark.parametrize("text", [VMMCALL, code("0f01c1f4", "vmcall; hlt")])
@pytest.mark.parametrize(("gpa", "pages", "attributes"), [
    (0x1000, 1, 16), (0, 512, 0), (1 << 40, 1, 17), (0x1000, 1, U64 - 1), (0, 1 << 52, 16), (PAGE, (1 << 52) - 2, 16),
])  # fmt: skip
def test_valid_hypercalls_exit(model_host: Any, text: bytes, gpa: int, pages: int, attributes: int) -> None:
    """KVM checks neither the attributes nor that memory is there: that is the VMM's to do."""
    with HcGuest(model_host, text) as guest:
        exit = guest.call(gpa, pages, attributes)
        assert isinstance(exit, Hypercall)
        assert (exit.nr, exit.args[:3], exit.ret, exit.long_mode) == (HC, (gpa, pages, attributes), 0, True)
        assert guest.regs().rip == CODE
        guest.vcpu.answer_hypercall(-22)
        assert guest.run() == Hlt() and guest.regs().rax == U64 - 22 and guest.regs().rip == CODE + 4


@pytest.mark.parametrize("text", [code("480f01d9f4", ".byte 0x48; vmmcall; hlt"), code("3e0f01d9f4", ".byte 0x3e; vmmcall; hlt")])
def test_hypercalls_with_prefixes_that_mean_nothing(model_host: Any, text: bytes) -> None:
    with HcGuest(model_host, text) as guest:
        assert isinstance(guest.call(0x1000, 1), Hypercall)
        guest.vcpu.answer_hypercall(7)
        assert guest.run() == Hlt() and guest.regs().rax == 7 and guest.regs().rip == CODE + len(text)


@pytest.mark.parametrize(("gpa", "pages"), [(0x800, 1), (0, 0), (0x1000, 0), (U64 - PAGE, U64 - 1), (PAGE, U64 - 1)])
def test_invalid_hypercalls(model_host: Any, gpa: int, pages: int) -> None:
    with HcGuest(model_host) as guest:
        assert guest.call(gpa, pages) == Hlt() and guest.regs().rax == U64 - 22


def test_hypercalls_that_are_not_on(model_host: Any) -> None:
    with HcGuest(model_host) as guest:
        assert guest.call(0, 1, number=99) == Hlt() and guest.regs().rax == U64 - 1000
        guest.vm.enable_cap(caps.KVM_CAP_EXIT_HYPERCALL, 0)
        assert guest.call(0, 1) == Hlt() and guest.regs().rax == U64 - 1000


def test_hypercalls_from_ring_3(model_host: Any) -> None:
    with HcGuest(model_host) as guest:
        sregs = guest.vcpu.get_sregs()
        for at in (0x1000, 0x2000, 0x3000):  # user bits in the tables
            data = bytearray(guest.get(at, PAGE))
            for entry in range(0, PAGE, 8):
                data[entry] |= 4 if data[entry] & 1 else 0
            guest.put(at, bytes(data))
        for name in ("cs", "ss"):
            getattr(sregs, name).dpl = 3
            getattr(sregs, name).selector |= 3
        guest.vcpu.set_sregs(sregs)
        guest.put(CODE, code("0f01d948 89042500 000300eb fe", "vmmcall; mov [0x30000], rax; 0: jmp 0b"))
        guest.regs(rax=HC, rbx=0, rcx=1, rdx=16)
        kick_soon(guest)
        assert guest.vcpu.run() == EINTR
        assert guest.get(DATA, 8) == struct.pack("<q", -1)


@contextmanager
def watchdog(guest: LongGuest) -> Iterator[None]:
    """A guest that would spin for ever is kicked after 10 s: the test fails instead of hanging."""
    timer = threading.Timer(10, guest.vcpu.request_exit)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def kick_soon(guest: LongGuest, after: float = 0.02) -> None:
    threading.Timer(after, guest.vcpu.request_exit).start()


# ---- code that changes
def test_the_guest_changes_its_own_code(model_host: Any) -> None:
    """The same instruction, patched between two executions, in a loop: each pass must run what stands there."""
    text = code("b00000c3 fe042501 000100ff c975f1f4", "0: mov al, 0; add bl, al; inc byte ptr [0x10001]; dec ecx; jnz 0b; hlt")
    with LongGuest(model_host, text) as guest:
        assert guest.again(rcx=10, rbx=0) == Hlt() and guest.regs().rbx == sum(range(10))


def test_the_guest_writes_a_sensitive_instruction(model_host: Any) -> None:
    """Code that becomes OUT only when the guest writes it must exit all the same, also where other code ran before."""
    text = code("b8001001 00ffd066 c7042500 100100e6 10ffe0", "mov eax, 0x11000; call rax; mov word ptr [0x11000], 0x10e6; jmp rax")
    with LongGuest(model_host, text) as guest:
        guest.put(0x11000, b"\x90\x90\xc3")
        assert guest.again().name == "IO"


def test_the_vmm_changes_code_between_runs(model_host: Any) -> None:
    with LongGuest(model_host, code("b8010000 00f4", "mov eax, 1; hlt")) as guest:
        assert guest.run() == Hlt() and guest.regs().rax == 1
        for value in range(2, 20):
            guest.put(CODE + 1, bytes([value]))
            assert guest.again() == Hlt() and guest.regs().rax == value
        guest.put(CODE, code("e610f4", "out 0x10, al; hlt"))
        assert guest.again().name == "IO"


@pytest.mark.parametrize("before", [1, 2])
def test_instructions_across_a_page_border(model_host: Any, before: int) -> None:
    text = code("66e710f4", "out 0x10, ax; hlt")
    size = len(text) - 1
    start = CODE + PAGE - min(before, size - 1)
    with LongGuest(model_host, b"") as guest:
        guest.put(start, text)
        exit = guest.again(rip=start, rsi=DATA, rcx=1, rdx=0x10)
        assert exit.name == "IO", "a sensitive instruction that begins on one page and ends on the next"
        assert guest.run() == Hlt() and guest.regs().rip == start + len(text)


# ---- kicks
def test_a_kick_stops_a_spinning_guest(model_host: Any) -> None:
    with LongGuest(model_host, code("ebfe", "0: jmp 0b")) as guest:
        for _ in range(5):
            guest.vcpu.request_exit(False)
            kicked: list[float] = []

            def kick(kicked: list[float] = kicked) -> None:
                kicked.append(time.monotonic())
                guest.vcpu.request_exit()

            threading.Timer(0.01, kick).start()
            assert guest.vcpu.run() == EINTR
            assert time.monotonic() - kicked[0] < 0.05


def test_kicks_lose_nothing(model_host: Any) -> None:
    """A register and a locked memory counter go up together; after each of 200 kicks they are equal, or one apart."""
    with LongGuest(model_host, code("f048ff04 25000003 0048ffc3 ebf2", "0: lock inc qword ptr [0x30000]; inc rbx; jmp 0b")) as guest:
        stop = threading.Event()

        def kicker() -> None:
            while not stop.wait(0.0007):
                guest.vcpu.request_exit()

        thread = threading.Thread(target=kicker)
        thread.start()
        try:
            last = -1
            for _ in range(200):
                guest.vcpu.request_exit(False)
                assert guest.vcpu.run() == EINTR
                count, register = struct.unpack("<Q", guest.get(DATA, 8))[0], guest.regs().rbx
                assert count - register in (0, 1) and count >= last
                last = count
            assert last > 200
        finally:
            stop.set()
            thread.join()


def together(*jobs: Callable[[], object]) -> list[object]:
    """Run jobs in threads; their results."""
    results: list[object] = [None] * len(jobs)
    threads = [threading.Thread(target=lambda n=n, job=job: results.__setitem__(n, job())) for n, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return results


def test_atomics_hold_between_vcpus(model_host: Any) -> None:
    text = code(
        "b9a08601 00b80100 0000f048 0fc10425 00000300 ffc975ed f4",
        "mov ecx, 100000; 0: mov eax, 1; lock xadd [0x30000], rax; dec ecx; jnz 0b; hlt",
    )
    with LongGuest(model_host, text, vcpus=4) as guest:
        assert together(*(lambda n=n: guest.run(n) for n in range(4))) == [Hlt()] * 4
        assert guest.get(DATA, 8) == struct.pack("<Q", 400_000)


def test_a_slot_is_deleted_while_a_vcpu_uses_it(model_host: Any) -> None:
    with LongGuest(model_host, code("48ff0425 00000001 ebf6", "0: inc qword ptr [0x1000000]; jmp 0b")) as guest:
        guest.vm.set_user_memory_region(1, 16 * MIB, PAGE, guest.hva + DATA)
        thread = threading.Timer(0.02, lambda: guest.vm.set_user_memory_region(1, 16 * MIB, 0, 0))
        thread.start()
        with watchdog(guest):
            exit = guest.run()
        assert exit == Mmio(16 * MIB, 8, False, b"")
        count = guest.get(DATA, 8)
        assert count != bytes(8)
        assert isinstance(exit, Mmio)
        guest.vcpu.answer_mmio(exit, bytes(8))
        assert guest.run() == Mmio(16 * MIB, 8, True, struct.pack("<Q", 1)) and guest.get(DATA, 8) == count


def test_a_vcpu_is_closed_while_it_runs(model_host: Any, no_leaks: None) -> None:
    with LongGuest(model_host, code("ebfe", "0: jmp 0b"), vcpus=2) as guest:
        vcpu = guest.vcpus.pop()
        run_map, fd = vcpu.run_map, vcpu.fd
        got: list[int] = []
        thread = threading.Thread(target=lambda: got.append(model_host.ioctl(fd, 0xAE80, 0)))
        thread.start()
        time.sleep(0.02)
        model_host.close(fd)
        vcpu.fd = -1
        run_map[1] = 1
        thread.join(timeout=10)
        assert got == [-EINTR]
        vcpu.close()


def test_memory_that_the_vmm_does_not_have(model_host: Any) -> None:
    """A slot over an unmapped user address: KVM_RUN fails with EFAULT, and nothing crashes; the same for a store to
    read-only user memory."""
    import ctypes

    text = code("48890425 00000001 f4", "mov [0x1000000], rax; hlt")
    readonly = ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "Py_Version")) & -PAGE
    for hva in (0x10000, readonly):
        with LongGuest(model_host, text) as guest:
            guest.vm.set_user_memory_region(1, 16 * MIB, PAGE, hva)
            assert guest.vcpu.run() == EFAULT and guest.vcpu.exit(EFAULT) == RunFailed(EFAULT)


def test_code_where_no_memory_is(model_host: Any) -> None:
    with LongGuest(model_host, code("b8000000 d0ffe0", "mov eax, 0xd0000000; jmp rax")) as guest:
        assert isinstance(guest.run(), InternalError)


# ---- SW_PROTECTED
TOUCH = code("48890348 8b0bf4", "mov [rbx], rax; mov rcx, [rbx]; hlt")


def test_memory_fault_without_guest_memfd(model_host: Any) -> None:
    with LongGuest(model_host, TOUCH, 1) as guest:
        guest.vm.set_memory_attributes(MIB, PAGE, kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE)
        guest.regs(rbx=MIB + 0x123, rax=7)
        for _ in range(2):  # again and again until the VMM does something about it
            assert guest.vcpu.run() == EFAULT
            assert guest.vcpu.exit(EFAULT) == MemoryFault(8, MIB, PAGE, EFAULT) and guest.vcpu.kvm_run.exit_reason == 39
            assert guest.regs().rip == CODE
        guest.vm.set_memory_attributes(MIB, PAGE, 0)
        assert guest.run() == Hlt() and guest.regs().rcx == 7


def test_the_attribute_chooses_the_backing(model_host: Any) -> None:
    with LongGuest(model_host, TOUCH, 1) as guest, guest.vm.create_guest_memfd(MIB) as memfd:
        guest.vm.set_user_memory_region2(1, 16 * MIB, MIB, guest.hva + MIB, guest_memfd=memfd.fd)
        assert guest.again(rbx=16 * MIB, rax=11) == Hlt() and guest.get(MIB, 8) == struct.pack("<Q", 11)
        guest.vm.set_memory_attributes(16 * MIB, PAGE, kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE)
        assert guest.again(rip=CODE + 3, rbx=16 * MIB) == Hlt() and guest.regs().rcx == 0, "the private side is another page"
        assert guest.again(rbx=16 * MIB, rax=22) == Hlt() and guest.get(MIB, 8) == struct.pack("<Q", 11)
        guest.vm.set_memory_attributes(16 * MIB, PAGE, 0)
        assert guest.again(rip=CODE + 3, rbx=16 * MIB) == Hlt() and guest.regs().rcx == 11
        guest.vm.set_memory_attributes(16 * MIB, PAGE, kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE)
        assert guest.again(rip=CODE + 3, rbx=16 * MIB) == Hlt() and guest.regs().rcx == 22, "neither side lost its contents"
        memfd.punch_hole(0, PAGE)
        assert guest.again(rip=CODE + 3, rbx=16 * MIB) == Hlt() and guest.regs().rcx == 0
        memfd.close()
        guest.regs(rip=CODE + 3, rbx=16 * MIB)
        assert guest.vcpu.run() == EFAULT and guest.vcpu.exit(EFAULT) == MemoryFault(8, 16 * MIB, PAGE, EFAULT)


def test_an_attribute_changes_under_a_running_vcpu(model_host: Any) -> None:
    with LongGuest(model_host, code("488b0beb fb", "0: mov rcx, [rbx]; jmp 0b"), 1) as guest:
        guest.regs(rbx=MIB)
        threading.Timer(0.02, lambda: guest.vm.set_memory_attributes(MIB, PAGE, 8)).start()
        with watchdog(guest):
            assert guest.vcpu.run() == EFAULT and guest.vcpu.exit(EFAULT) == MemoryFault(8, MIB, PAGE, EFAULT)


def test_mmio_on_a_private_gfn_is_a_memory_fault(model_host: Any) -> None:
    with LongGuest(model_host, TOUCH, 1) as guest:
        guest.vm.set_memory_attributes(MMIO, PAGE, 8)
        guest.regs(rbx=MMIO)
        assert guest.vcpu.run() == EFAULT and guest.vcpu.exit(EFAULT) == MemoryFault(8, MMIO, PAGE, EFAULT)
