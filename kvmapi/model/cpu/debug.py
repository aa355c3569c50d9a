"""KVM_SET_GUEST_DEBUG: single steps, software and hardware breakpoints, each ending KVM_RUN with KVM_EXIT_DEBUG.

- Single step: one instruction is executed alone, whatever it is, and the exit follows it. An instruction that itself
  exits to user space (OUT, say) exits first; the debug exit comes when it is completed.
- Software breakpoints: INT3 exits instead of reaching the guest, with RIP on the INT3.
- Hardware execution breakpoints are native stop hooks: they cost nothing until they are hit. RFLAGS.RF lets the guest
  past one.
- The guest's own breakpoints in DR0-DR3 work the same way and end in its #DB, while user space uses none.
- Data breakpoints are found by stepping and watching accesses, which is slow and exact.

Source: struct kvm_guest_debug and kvm_debug_exit_arch; kvm_arch_vcpu_ioctl_set_guest_debug in arch/x86/kvm/x86.c.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from unicorn import unicorn_const as uc

from kvmapi.abi import kvm
from kvmapi.model.cpu import hazards, layout, scan
from kvmapi.model.cpu.mmu import Fault
from kvmapi.model.mem.physical import Refused

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu

DB_VECTOR, BP_VECTOR = 1, 3
_DR6_ACTIVE_LOW, _DR6_BS, _DR6_RESERVED = 0xFFFF0FF0, 1 << 14, 1 << 12
_DR6_BD, _DR7_GD = 1 << 13, 1 << 13
_DR7_ALWAYS, _DR7_RESERVED = 1 << 10, 0xD800  # of its lower half
_RF, _TF = 1 << 16, 1 << 8
_REPEAT = (b"\xf2", b"\xf3")
_THROUGH_KVM = frozenset((1, 6, 17))  # exceptions that kvm_amd intercepts and delivers again
_LENGTHS = (1, 2, 8, 4)  # DR7.LEN
_EXECUTE, _STORE, _ACCESS = 0, 1, 3  # DR7.RW; 2 is I/O, which no KVM guest debug supports


class Breakpoint(NamedTuple):
    """One enabled debug register."""

    number: int
    address: int
    kind: int
    length: int


def breakpoints(registers: tuple[int, ...]) -> list[Breakpoint]:
    """The enabled breakpoints in DR0-DR3 and DR7."""
    dr7 = registers[7]
    found = []
    for number in range(4):
        if dr7 >> 2 * number & 3:
            field = dr7 >> 16 + 4 * number
            found.append(Breakpoint(number, registers[number], field & 3, _LENGTHS[field >> 2 & 3]))
    return found


class GuestDebug:
    """User space's debugging of one vCPU."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._control = 0
        self._asked_for: tuple[int, ...] = (0,) * 8
        self._guest_owns = True
        self._breakpoints: list[Breakpoint] = []
        self._data: list[Breakpoint] = []
        self._completing = False
        self._hit = 0
        self._dr7 = 0x400
        self._trap = False  # RFLAGS.TF as KVM sets it for steps; the guest's own is in its flags
        self._began = 0

    @property
    def enabled(self) -> bool:
        """Does user space debug at all?"""
        return bool(self._control)

    @property
    def active(self) -> bool:
        """Must every instruction be stepped?"""
        return bool(self._trap or self._data or self._completing)

    @property
    def catches_int3(self) -> bool:
        return bool(self._control & kvm.KVM_GUESTDBG_USE_SW_BP)

    @property
    def blocks_events(self) -> bool:
        """Do NMIs wait until user space is done?"""
        return bool(self._control & kvm.KVM_GUESTDBG_BLOCKIRQ)

    @property
    def catches_db(self) -> bool:
        """Does a #DB of the guest's go to user space?"""
        return bool(self._control & (kvm.KVM_GUESTDBG_SINGLESTEP | kvm.KVM_GUESTDBG_USE_HW_BP))

    def set(self, control: int, registers: tuple[int, ...]) -> None:
        """A new request; without KVM_GUESTDBG_ENABLE everything is off."""
        self._control = control if control & kvm.KVM_GUESTDBG_ENABLE else 0
        self._asked_for = registers
        self._completing = False
        self._trap = bool(self._control & kvm.KVM_GUESTDBG_SINGLESTEP)
        self._began = self._cpu.registers.linear_rip
        self._arm()

    def _arm(self) -> None:
        """Which breakpoints count now: user space's while it uses the hardware's, the guest's own otherwise."""
        self._guest_owns = not self._control & kvm.KVM_GUESTDBG_USE_HW_BP
        hardware = breakpoints(self.registers() if self._guest_owns else self._asked_for)
        self._dr7 = self._asked_for[7] if not self._guest_owns and (hardware or self._asked_for[7] & _DR7_GD) else 0x400
        self._breakpoints = [point for point in hardware if point.kind == _EXECUTE]
        self._data = [point for point in hardware if point.kind in (_STORE, _ACCESS)]
        self._cpu.attention = True
        code = self._cpu.code
        addresses = frozenset(point.address for point in self._breakpoints)
        if code.breakpoints != addresses:
            code.breakpoints = addresses
            code.flush()

    # ---- the guest's own debug registers
    def registers(self) -> tuple[int, ...]:
        """DR0 to DR7."""
        return struct.unpack_from("<8Q", self._cpu.native.state, self._cpu.where.debug)

    def write_register(self, number: int, value: int) -> None:
        """The guest's DR0-DR3, DR6 or DR7; reserved bits keep what they always are. The engine never hears of it: its
        own breakpoints are not used.
        """
        if number == 6:
            value = value & ~_DR6_RESERVED | _DR6_ACTIVE_LOW
        elif number == 7:
            value = value & ~_DR7_RESERVED | _DR7_ALWAYS
        struct.pack_into("<Q", self._cpu.native.state, self._cpu.where.debug + 8 * number, value)
        if number != 6:
            self.guest_changed()

    def guest_changed(self) -> None:
        """The guest's debug registers were written."""
        if self._guest_owns and (self._breakpoints or self._data or self.registers()[7] & 0xFF):
            self._arm()

    def registers_set(self) -> None:
        """User space wrote RFLAGS and RIP: steps go on only from where they began."""
        if self._control & kvm.KVM_GUESTDBG_SINGLESTEP:
            self._trap = self._cpu.registers.linear_rip == self._began
            self._cpu.attention = True

    def delivered(self, vector: int) -> int:
        """An event is delivered, which clears TF: steps end, until IRET loads the flags that are pushed now. What KVM
        delivers itself has TF in them only where the steps began.
        """
        trap, self._trap = self._trap, False
        return _TF if trap and (vector not in _THROUGH_KVM or self._cpu.registers.linear_rip == self._began) else 0

    @property
    def detects_access(self) -> bool:
        """DR7.GD: is the next MOV to or from a debug register to be reported, and not executed?"""
        return bool((self.registers()[7] if self._guest_owns else self._asked_for[7]) & _DR7_GD)

    def access_detected(self) -> int | None:
        """Such a MOV: an exit, or the guest's #DB, whose handler finds GD cleared (None)."""
        if self.catches_db:
            return self._exit(DB_VECTOR, _DR6_ACTIVE_LOW | _DR6_BD)
        *_, dr6, dr7 = self.registers()
        self.write_register(6, dr6 | _DR6_BD)
        self.write_register(7, dr7 & ~_DR7_GD)
        return self._cpu.raise_in_guest(DB_VECTOR, None)

    # ---- exits
    def _exit(self, vector: int, dr6: int) -> int:
        pc = self._cpu.registers.linear_rip
        return self._cpu.page.payload(kvm.KVM_EXIT_DEBUG, "<I4xQQQ", vector, pc, dr6, self._dr7)

    def int3(self, length: int = 1) -> int:
        """The guest is past an INT3 that user space wants to see: RIP goes back onto it."""
        registers = self._cpu.registers
        registers.rip = registers.rip - length & 0xFFFFFFFFFFFFFFFF
        return self._exit(BP_VECTOR, _DR6_ACTIVE_LOW)

    def hits(self, rip: int) -> int:
        """The execution breakpoints at `rip`, as bits of DR6."""
        if not self._breakpoints or self._cpu.registers.u64[layout.EFLAGS >> 3] & _RF:
            return 0
        return sum(1 << point.number for point in self._breakpoints if point.address == rip)

    def strike(self, bits: int) -> int | None:
        """Breakpoints were hit: an exit, or, when they are the guest's own, its #DB (None)."""
        if not self._guest_owns:
            return self._exit(DB_VECTOR, _DR6_ACTIVE_LOW | bits)
        self.write_register(6, self.registers()[6] | bits)
        return self._cpu.raise_in_guest(DB_VECTOR, None)

    def trapped(self) -> int:
        """The engine's own #DB, by a TF that the guest has loaded: user space's, if it asked for steps."""
        registers = self._cpu.registers
        if self._control & kvm.KVM_GUESTDBG_SINGLESTEP:
            registers.set_flags(registers.u64[layout.EFLAGS >> 3] & ~_TF)
            self._trap = self._cpu.attention = True
        return self._exit(DB_VECTOR, _DR6_ACTIVE_LOW | _DR6_BS)

    # ---- stepping
    def completed(self) -> int | None:
        """User space answered the exit of a stepped instruction: now its debug exit is due."""
        if not self._completing:
            return None
        self._completing = False
        return self._after(0)

    def step(self) -> int | None:
        """Execute one instruction; KVM_RUN's result, or None when only data breakpoints are watched and none was hit."""
        cpu = self._cpu
        if not self._trap:
            found = self.hits(cpu.registers.linear_rip)
            if found:
                return self.strike(found)
        site = self.sensitive()
        if site is not None:
            result = cpu.privileged.execute(site)
            if result is None:
                return self._after(0)
            self._completing = True
            return result
        self._hit = 0
        watch = self._accessed if self._data else None
        before = cpu.registers.rip
        error = cpu.step(watch)
        if cpu.registers.rip == before and not cpu.registers.gpr(1) and self.opcode() in _REPEAT:
            error = cpu.step(watch)  # the engine counts leaving a repetition as one more
        result = cpu.after_step(error)
        if result is not None:
            return result
        return self._after(self._hit)

    def opcode(self) -> bytes:
        """The first byte of the instruction at RIP; nothing where it cannot be read."""
        try:
            return self._cpu.mmu.read(self._cpu.registers.linear_rip, 1)
        except (Fault, Refused):
            return b""

    def _after(self, hit: int) -> int | None:
        if hit:
            return self.strike(hit)
        return self._exit(DB_VECTOR, _DR6_ACTIVE_LOW | _DR6_BS) if self._trap else None

    def sensitive(self) -> scan.Site | None:
        """The instruction at RIP if it is one that the engine must not execute."""
        code, bits, more = self._cpu.code_here(), self._cpu.registers.code_bits, self._cpu.code.more
        sites = hazards.find(code, 1, bits)
        if more is not None:
            more(code, 1, bits, sites)
        return sites.get(0)

    def _accessed(self, _uc: int, kind: int, where: int, size: int, _value: int, _data: int) -> None:
        store = kind == uc.UC_MEM_WRITE
        for point in self._data:
            if (store or point.kind == _ACCESS) and self._cpu.touches(where, size, point.address, point.length):
                self._hit |= 1 << point.number
