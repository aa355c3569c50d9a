"""KVM_SET_GUEST_DEBUG: single steps, software and hardware breakpoints, watched data; each comes back as KVM_EXIT_DEBUG."""

from __future__ import annotations

import ctypes
from errno import EBUSY
from typing import Any

import pytest

from kvmapi.abi import ioctls, kvm
from kvmapi.abi import vcpu as v
from kvmapi.exits import Debug, Hlt, Io
from tests.conformance.rows import feature
from tests.conformance.snippets import CODE, DATA, HOLE, STACK, LongGuest, RealGuest, code

HLT = code("f4", "hlt")
ON, STEP = kvm.KVM_GUESTDBG_ENABLE, kvm.KVM_GUESTDBG_ENABLE | kvm.KVM_GUESTDBG_SINGLESTEP
SOFTWARE, HARDWARE = ON | kvm.KVM_GUESTDBG_USE_SW_BP, ON | kvm.KVM_GUESTDBG_USE_HW_BP
DB, BP = 1, 3
ACTIVE_LOW, BS = 0xFFFF0FF0, 1 << 14
RF, TF = 1 << 16, 1 << 8
EXECUTE, STORE, ACCESS = 0, 1, 3


@pytest.fixture(autouse=True)
def hardware_only(request: pytest.FixtureRequest, any_host: Any) -> None:
    """A paravirtual kernel takes KVM_SET_GUEST_DEBUG and reports nothing, or something else."""
    with LongGuest(any_host, HLT) as guest:
        if not feature(guest, "hardware virtualization"):
            pytest.skip("paravirtual: guests cannot be debugged as on hardware")


def breakpoints_work(guest: LongGuest) -> None:
    """Skip where the emulated CPU cannot: QEMU's TCG intercepts no INT3, and loads no breakpoints from a guest's DR7."""
    if not feature(guest, "an exact CPU"):
        pytest.skip("the lab's CPU has no breakpoints for guests")


def registers(address: int, kind: int = EXECUTE, length: int = 1, number: int = 0) -> list[int]:
    """DR0..DR7 with one breakpoint."""
    found = [0] * 8
    found[number] = address
    found[7] = 0x400 | 2 << 2 * number | (kind | {1: 0, 2: 1, 4: 3, 8: 2}[length] << 2) << 16 + 4 * number
    return found


def steps(guest: LongGuest | RealGuest, count: int) -> list[int]:
    """Offsets of RIP from CODE at so many debug exits; anything else fails."""
    found = []
    for _ in range(count):
        exit = guest.run()
        assert isinstance(exit, Debug) and exit.exception == DB and exit.dr6 & BS, exit
        assert exit.pc == guest.regs().rip
        found.append(exit.pc - CODE)
    return found


# ---- the ioctl
def test_control_bits(any_host: Any) -> None:
    """Bits that nobody knows are let pass; nothing counts without KVM_GUESTDBG_ENABLE."""
    with LongGuest(any_host, code("9090f4", "nop; nop; hlt")) as guest:
        guest.vcpu.set_guest_debug(1 << 15 | 1 << 31)
        guest.vcpu.set_guest_debug(kvm.KVM_GUESTDBG_SINGLESTEP)
        assert guest.run() == Hlt()


@pytest.mark.parametrize(
    ("bit", "vector", "text", "pushed"),
    [(kvm.KVM_GUESTDBG_INJECT_DB, 1, code("90f4", "nop; hlt"), CODE), (kvm.KVM_GUESTDBG_INJECT_BP, 3, code("ccf4", "int3; hlt"), CODE + 1)],
    ids=["DB", "BP"],
)
def test_injection(any_host: Any, bit: int, vector: int, text: bytes, pushed: int) -> None:
    """#BP is meant for an INT3 at RIP that user space did not put there: the frame points behind it."""
    with LongGuest(any_host, text) as guest:
        guest.vcpu.set_guest_debug(ON | bit)
        argument = v.kvm_guest_debug(control=ON | bit)
        assert guest.vcpu.ioctl_raw(ioctls.KVM_SET_GUEST_DEBUG, ctypes.addressof(argument)) == -EBUSY
        assert guest.run() == Hlt() and guest.vector() == vector and guest.frame().rip == pushed


def test_setting_registers_takes_a_queued_exception_back(any_host: Any) -> None:
    with LongGuest(any_host, code("90f4", "nop; hlt")) as guest:
        guest.vcpu.set_guest_debug(ON | kvm.KVM_GUESTDBG_INJECT_DB)
        guest.regs(rax=1)
        assert guest.run() == Hlt() and guest.regs().rip == CODE + 2


def test_nmis_wait_while_events_are_blocked(any_host: Any) -> None:
    """KVM_GUESTDBG_BLOCKIRQ; what user space injects as begun is delivered all the same."""
    with LongGuest(any_host, code("90f4", "nop; hlt")) as guest:
        guest.vcpu.set_guest_debug(ON | kvm.KVM_GUESTDBG_BLOCKIRQ)
        guest.vcpu.nmi()
        assert guest.run() == Hlt() and guest.regs().rip == CODE + 2
        assert guest.vcpu.get_vcpu_events().nmi.pending == 1
        guest.vcpu.set_guest_debug(0)
        assert guest.again() == Hlt() and guest.vector() == 2


# ---- single steps
def test_single_step(any_host: Any) -> None:
    with LongGuest(any_host, code("90ffc0b9 07000000 eb020f0b 90f4", "nop; inc eax; mov ecx, 7; jmp 1f; ud2; 1: nop; hlt")) as guest:
        guest.vcpu.set_guest_debug(STEP)
        guest.regs(rax=0, rcx=0)
        assert steps(guest, 2) == [1, 3] and (guest.regs().rax, guest.regs().rcx) == (1, 0)
        assert not guest.regs().rflags & TF, "the flag that does it is not shown"
        assert steps(guest, 3) == [8, 12, 13]
        assert guest.run() == Hlt(), "HLT leaves by itself"
        guest.vcpu.set_guest_debug(0)
        assert guest.again() == Hlt()


def test_dr6_and_dr7_of_a_step(any_host: Any) -> None:
    with LongGuest(any_host, code("90f4", "nop; hlt")) as guest:
        guest.vcpu.set_guest_debug(STEP)
        assert guest.run() == Debug(DB, CODE + 1, ACTIVE_LOW | BS, 0x400)
        assert guest.vcpu.get_debugregs().dr6 == ACTIVE_LOW, "the guest's own is left alone"


def test_stepping_an_out(any_host: Any) -> None:
    """The I/O exit comes first; the step is over when user space comes back."""
    with LongGuest(any_host, code("90e61090 f4", "nop; out 0x10, al; nop; hlt")) as guest:
        guest.vcpu.set_guest_debug(STEP)
        assert steps(guest, 1) == [1]
        assert isinstance(guest.run(), Io)
        assert steps(guest, 2) == [3, 4]


def test_stepping_an_in(any_host: Any) -> None:
    with LongGuest(any_host, code("e41090f4", "in al, 0x10; nop; hlt")) as guest:
        guest.vcpu.set_guest_debug(STEP)
        exit = guest.run()
        assert isinstance(exit, Io)
        guest.vcpu.answer_io(exit, b"\x77")
        assert steps(guest, 1) == [2] and guest.regs().rax & 0xFF == 0x77
        assert steps(guest, 1) == [3]


def test_stepping_what_kvm_executes(any_host: Any) -> None:
    """CPUID, RDMSR and WRMSR are one step each, like any instruction."""
    with LongGuest(any_host, code("0fa2b980 0000c00f 320f3090 f4", "cpuid; mov ecx, 0xc0000080; rdmsr; wrmsr; nop; hlt")) as guest:
        guest.vcpu.set_guest_debug(STEP)
        assert steps(guest, 5) == [2, 7, 9, 11, 12]
        assert guest.run() == Hlt()


def test_stepping_a_repetition(any_host: Any) -> None:
    """One element a step, with RIP on the instruction until the last."""
    with LongGuest(any_host, code("f3a490f4", "rep movsb; nop; hlt")) as guest:
        guest.put(DATA, b"abc")
        guest.vcpu.set_guest_debug(STEP)
        guest.regs(rsi=DATA, rdi=DATA + 16, rcx=3)
        assert steps(guest, 3) == [0, 0, 2]
        assert (guest.regs().rcx, guest.get(DATA + 16, 4)) == (0, b"abc\0")
        assert steps(guest, 1) == [3]


def test_no_steps_in_a_handler(any_host: Any) -> None:
    """A step is RFLAGS.TF, which delivery clears: the handler runs unwatched, and IRET brings the steps back."""
    with LongGuest(any_host, code("908a0425 0000e03f 9090f4", "nop; mov al, [0x3fe00000]; nop; nop; hlt")) as guest:
        guest.put(0x18000, code("ffc39048 83c40848 83042407 48cf", "inc ebx; nop; add rsp, 8; add qword ptr [rsp], 7; iretq"))
        guest.set_gate(14, 0x18000)
        guest.regs(rbx=0)
        guest.vcpu.set_guest_debug(STEP)
        assert steps(guest, 1) == [1]
        assert steps(guest, 1) == [9] and guest.regs().rbx == 1, "the first instruction behind the IRET"
        assert steps(guest, 1) == [10]


def test_steps_end_where_kvm_delivers(any_host: Any) -> None:
    """#UD passes through KVM, which sets TF again only where the stepping began: the guest runs on."""
    with LongGuest(any_host, code("900f0b90 90f4", "nop; ud2; nop; nop; hlt")) as guest:
        guest.put(0x18000, code("48830424 0248cf", "add qword ptr [rsp], 2; iretq"))
        guest.set_gate(6, 0x18000)
        guest.vcpu.set_guest_debug(STEP)
        assert steps(guest, 1) == [1]
        assert guest.run() == Hlt() and guest.regs().rip == CODE + 6


def test_setting_registers_ends_the_steps(any_host: Any) -> None:
    """Except where they began. Who sets registers asks for the steps again."""
    with LongGuest(any_host, code("90909090 f4", "nop; nop; nop; nop; hlt")) as guest:
        guest.vcpu.set_guest_debug(STEP)
        guest.regs(rax=1)
        assert steps(guest, 1) == [1]
        guest.regs(rax=2)
        guest.vcpu.set_guest_debug(STEP)
        assert steps(guest, 1) == [2]
        guest.regs(rax=3)
        assert guest.run() == Hlt()


def test_the_guests_own_trap_flag(any_host: Any) -> None:
    with LongGuest(any_host, code("9090f4", "nop; nop; hlt")) as guest:
        guest.regs(rflags=2 | TF)
        assert guest.run() == Hlt() and guest.vector() == DB
        assert guest.frame()[1:] == (CODE + 1, 8, 2 | TF, STACK, 0x10) and not guest.regs().rflags & TF
        assert guest.vcpu.get_debugregs().dr6 == ACTIVE_LOW | BS


def test_stepping_in_real_mode(any_host: Any) -> None:
    with RealGuest(any_host, code("9040f4", "nop; inc ax; hlt", 16)) as guest:
        guest.vcpu.set_guest_debug(STEP)
        guest.regs(rax=0)
        for pc in (0x1001, 0x1002):
            exit = guest.run()
            assert isinstance(exit, Debug) and exit.pc == pc
        assert guest.regs().rax == 1 and guest.run() == Hlt()


# ---- software breakpoints
def test_software_breakpoint(any_host: Any) -> None:
    """INT3 exits with RIP on it, and the guest's handler does not see it. User space puts the instruction back and goes on."""
    with LongGuest(any_host, code("90cc90f4", "nop; int3; nop; hlt")) as guest:
        breakpoints_work(guest)
        guest.vcpu.set_guest_debug(SOFTWARE)
        for _ in range(2):
            exit = guest.run()
            assert isinstance(exit, Debug) and (exit.exception, exit.pc) == (BP, CODE + 1)
            assert guest.regs().rip == CODE + 1, "it would strike again"
        guest.put(CODE + 1, b"\x90")
        assert guest.run() == Hlt() and guest.regs().rip == CODE + 4


def test_int3_without_debugging(any_host: Any) -> None:
    with LongGuest(any_host, code("90cc90f4", "nop; int3; nop; hlt")) as guest:
        guest.vcpu.set_guest_debug(ON)
        assert guest.run() == Hlt() and guest.vector() == 3 and guest.frame().rip == CODE + 2


# ---- hardware breakpoints
@pytest.mark.parametrize("number", range(4))
def test_execution_breakpoint(any_host: Any, number: int) -> None:
    with LongGuest(any_host, code("ffc090ff c090f4", "inc eax; nop; inc eax; nop; hlt")) as guest:
        breakpoints_work(guest)
        guest.vcpu.set_guest_debug(HARDWARE, registers(CODE + 3, number=number))
        guest.regs(rax=0)
        for _ in range(2):
            exit = guest.run()
            assert isinstance(exit, Debug) and (exit.exception, exit.pc) == (DB, CODE + 3)
            assert exit.dr6 & 0xF == 1 << number and exit.dr7 == registers(0, number=number)[7]
            assert guest.regs().rax == 1, "before the instruction, every time"
        guest.regs(rflags=2 | RF)
        assert guest.run() == Hlt() and guest.regs().rax == 2, "RF lets the guest past"


def test_a_breakpoint_that_is_not_enabled(any_host: Any) -> None:
    with LongGuest(any_host, code("9090f4", "nop; nop; hlt")) as guest:
        disabled = registers(CODE + 1)
        disabled[7] = 0x400
        guest.vcpu.set_guest_debug(HARDWARE, disabled)
        assert guest.run() == Hlt()
        guest.vcpu.set_guest_debug(ON, registers(CODE + 1))
        assert guest.again() == Hlt(), "the registers count only with KVM_GUESTDBG_USE_HW_BP"


@pytest.mark.parametrize(
    ("kind", "length", "address", "hits"),
    [
        (STORE, 4, DATA, [7]), (STORE, 1, DATA + 3, [7]), (STORE, 1, DATA + 4, []), (STORE, 8, DATA, [7]),
        (ACCESS, 4, DATA, [7]), (ACCESS, 4, DATA + 8, [14]), (STORE, 4, DATA + 8, []),
    ],
)  # fmt: skip
def test_data_breakpoint(any_host: Any, kind: int, length: int, address: int, hits: list[int]) -> None:
    """A trap: the exit is behind the instruction that touched the data."""
    with LongGuest(any_host, code("89042500 0003008b 0c250800 030090f4", "mov [0x30000], eax; mov ecx, [0x30008]; nop; hlt")) as guest:
        breakpoints_work(guest)
        guest.vcpu.set_guest_debug(HARDWARE, registers(address, kind, length, 2))
        for offset in hits:
            exit = guest.run()
            assert isinstance(exit, Debug) and (exit.exception, exit.pc) == (DB, CODE + offset)
            assert exit.dr6 & 0xF == 4
        assert guest.run() == Hlt()


def test_the_guests_own_breakpoints_are_hidden(any_host: Any) -> None:
    """While user space has the debug registers, the guest's do not strike; it still reads its own."""
    with LongGuest(any_host, code("900f21c0 0f21fbf4", "nop; mov rax, dr0; mov rbx, dr7; hlt")) as guest:
        breakpoints_work(guest)
        own = guest.vcpu.get_debugregs()
        own.db[0], own.dr7 = CODE + 1, 0x402
        guest.vcpu.set_debugregs(own)
        guest.vcpu.set_guest_debug(HARDWARE, registers(CODE + 4))
        exit = guest.run()
        assert isinstance(exit, Debug) and exit.pc == CODE + 4
        guest.vcpu.set_guest_debug(0)
        after = guest.vcpu.get_debugregs()
        assert (after.db[0], after.dr7) == (CODE + 1, 0x402)


def test_steps_and_breakpoints_together(any_host: Any) -> None:
    with LongGuest(any_host, code("90cc90f4", "nop; int3; nop; hlt")) as guest:
        breakpoints_work(guest)
        guest.vcpu.set_guest_debug(STEP | SOFTWARE)
        assert steps(guest, 1) == [1]
        exit = guest.run()
        assert isinstance(exit, Debug) and (exit.exception, exit.pc) == (BP, CODE + 1)
        assert guest.regs().rsp == STACK


# ---- DR7.GD: accesses to debug registers
GD, BD = 1 << 13, 1 << 13


@pytest.mark.parametrize("text", [code("0f21c0f4", "mov rax, dr0; hlt"), code("0f23c0f4", "mov dr0, rax; hlt")])
def test_user_space_hears_of_debug_registers(any_host: Any, text: bytes) -> None:
    with LongGuest(any_host, text) as guest:
        breakpoints_work(guest)
        guest.vcpu.set_guest_debug(HARDWARE, [0] * 7 + [0x400 | GD])
        assert guest.run() == Debug(DB, CODE, ACTIVE_LOW | BD, 0x400 | GD) and guest.regs().rip == CODE
        guest.vcpu.set_guest_debug(0)
        assert guest.run() == Hlt() and guest.regs().rip == CODE + 4


def test_the_guests_own_detection(any_host: Any) -> None:
    """Its #DB is a fault, and clears GD: the handler may look."""
    with LongGuest(any_host, code("0f23f8 0f21c3 f4", "mov dr7, rax; mov rbx, dr0; hlt")) as guest:
        breakpoints_work(guest)
        assert guest.again(rax=0x400 | GD) == Hlt() and guest.vector() == DB and guest.frame().rip == CODE + 3
        state = guest.vcpu.get_debugregs()
        assert state.dr6 & BD and not state.dr7 & GD


def test_debug_registers_are_read(any_host: Any) -> None:
    with LongGuest(any_host, code("0f21d0 f4", "mov rax, dr2; hlt")) as guest:
        state = guest.vcpu.get_debugregs()
        state.db[2] = 0x123456789A
        guest.vcpu.set_debugregs(state)
        guest.run()
        assert guest.regs().rax == 0x123456789A


def test_a_step_to_where_nothing_is(any_host: Any) -> None:
    """The jump is done and told; that nothing can be fetched there is the next step's matter."""
    with LongGuest(any_host, code("ffe0", "jmp rax")) as guest:
        guest.regs(rax=HOLE + 0x10)
        guest.vcpu.set_guest_debug(STEP)
        assert steps(guest, 1) == [HOLE + 0x10 - CODE]
        guest.vcpu.set_guest_debug(0)
        assert guest.run() == Hlt() and guest.vector() == 14 and guest.vcpu.get_sregs().cr2 == HOLE + 0x10
