"""One vCPU's processor: the engine, the MMU, and what the engine leaves to us.

`go` runs the guest until the VMM is needed. The engine stops for one of these reasons, looked at in this order:

1. the MMU refused an access: a guest fault is delivered, memory that is not there becomes MMIO, and an access that
   contradicts the memory attributes becomes a memory-fault exit. The instruction was not executed;
2. the engine raised an exception: it is delivered through the guest's IDT;
3. a stop hook: a sensitive instruction is next (code.py), and is executed here;
4. a kick: someone wants the vCPU or the engine lock.

The engine's CPU structure holds the registers and is edited in place between stops (state.py); RIP is passed to the
engine at each start.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc

from kvmapi.abi import kvm
from kvmapi.model.caller import PAGE
from kvmapi.model.cpu import hazards, layout, scan
from kvmapi.model.cpu.code import CodeCache, Retranslate
from kvmapi.model.cpu.cpuid import Table
from kvmapi.model.cpu.debug import GuestDebug
from kvmapi.model.cpu.events import Events
from kvmapi.model.cpu.exceptions import Exceptions
from kvmapi.model.cpu.hypercalls import Hypercalls
from kvmapi.model.cpu.mmio import MmioUnit, scratch_page
from kvmapi.model.cpu.mmu import Fault, Mmu
from kvmapi.model.cpu.msrs import Msrs
from kvmapi.model.cpu.native import Native
from kvmapi.model.cpu.policy import ExitPolicy
from kvmapi.model.cpu.privileged import Privileged
from kvmapi.model.cpu.refusals import Refusals
from kvmapi.model.cpu.state import Registers
from kvmapi.model.cpu.step import Stepper, Watch
from kvmapi.model.mem.physical import Physical, Refused
from kvmapi.model.mem.private import EncryptedPhysical
from kvmapi.model.runpage import IMMEDIATE_EXIT, RunPage
from kvmapi.model.stats import EXITS, OF_VCPU, Stats

if TYPE_CHECKING:
    from kvmapi.model.ghcb.intercepts import Intercepts
    from kvmapi.model.irq.lapic import Lapic

_RIP, _HFLAGS, _CS64 = layout.EIP >> 3, layout.HFLAGS >> 2, layout.HF_CS64  # for the hot path
KICKED = 1 << 20  # no errno and no KVM_RUN result: the engine lock or the vCPU is wanted elsewhere
_UD, _SS = 6, 12
_INVALID_STATE = 0xFFFFFFFF  # SVM's exit code for a guest state that it refuses
_RF = 1 << 16


class Cpu:
    """The processor of one vCPU. Not thread-safe: the caller holds the VM's engine lock."""

    def __init__(self, physical: Physical, page: RunPage, bootstrap: bool, policy: ExitPolicy) -> None:
        self.native = Native()
        self.where = layout.calibrate()
        self.registers = Registers(self.native, self.where)
        self.page = page
        self.physical = physical
        self._scratch_page, self.scratch_address = scratch_page()
        self.scratch = memoryview(self._scratch_page)
        self.kick = page.kick
        self.native.hook_kick(page.address + IMMEDIATE_EXIT)
        self.native.quieten(self.where.quiet)
        self.watching = (ctypes.c_uint32 * 1)()  # element 0: STI, POPF and IRET stop the engine
        self.code = CodeCache(self.native, self.watching, self._read_code)
        self.mmu = Mmu(self.native, self.where, physical, self.scratch_address, self.code, self._fetched)
        self.stepper = Stepper(self)
        self.cpuid = Table([])
        self.msrs = Msrs(self.registers, policy, bootstrap=bootstrap)
        self.privileged = Privileged(self, policy)
        self.hypercalls = Hypercalls(self, policy)
        self.events = Events(self)
        self.debug = GuestDebug(self)
        self.mmio = MmioUnit(self)
        self.refusals = Refusals(self)
        self.exceptions = Exceptions(self)
        self.raise_in_guest, self.internal_error = self.exceptions.raise_in_guest, self.exceptions.internal_error
        self.stats = Stats("", OF_VCPU)
        self.hides_et = False  # user space set CR0 without ET, and reads it so until the guest runs
        self.refuses_entry = False  # a state that the processor does not enter the guest with
        self.intercepts: Intercepts | None = None  # of an SEV-ES guest: what raises #VC in it
        self.attention = False  # events or debugging want a look before the guest is entered
        self.lapic: Lapic | None = None  # where KVM_CREATE_IRQCHIP made controllers
        self.policy = policy
        self.task_priority = 0
        self.event = -1  # the exception that the engine reported last
        self.stepped = False  # was it the stepper that ran last?
        self._code_generation = physical.code_generation
        physical.code_caches.add(self.code)
        self.native.hook_interrupts(self._interrupted)
        self.reason = ""  # why the last internal error, in words

    @property
    def cr8(self) -> int:
        """The task priority, which the local APIC keeps where there is one."""
        return self.task_priority if self.lapic is None else self.lapic.cr8

    @cr8.setter
    def cr8(self, value: int) -> None:
        if self.lapic is None:
            self.task_priority = value
        else:
            self.lapic.cr8 = value

    def device_read(self, gpa: int, size: int) -> bytes | None:
        """A load from where no memory is; None: nobody but user space has a device there."""
        lapic, bus = self.lapic, self.policy.bus
        if lapic is not None and gpa & -PAGE == lapic.page:
            return lapic.read(gpa & (PAGE - 1), size).to_bytes(size, "little")
        return bus.read("mmio", gpa, size) if bus is not None else None

    def device_write(self, gpa: int, data: bytes) -> bool:
        """A store to where no memory is; False: user space must hear of it."""
        lapic, bus = self.lapic, self.policy.bus
        if lapic is not None and gpa & -PAGE == lapic.page:
            lapic.write(gpa & (PAGE - 1), len(data), int.from_bytes(data, "little"))
            return True
        return bus is not None and bus.write("mmio", gpa, data)

    def destroy(self) -> None:
        """Free the engine."""
        self.scratch.release()
        self.stepper.destroy()
        self.code.destroy()
        self.native.close()

    # ---- callbacks from inside the engine
    def _interrupted(self, _uc: int, number: int, _data: int) -> None:
        self.event = number
        self.native.stop()

    def _read_code(self, va: int, size: int) -> bytes:
        return self.mmu.read_code(va, size)

    def _fetched(self, va: int, gfn: int, pointer: int, address: int) -> None:
        if self.physical.code_generation != self._code_generation:  # a frame with code was given up just now
            raise Retranslate
        self.code.secret = self.mmu.c_mask != 0
        self.code.fetched(va, pointer, address)
        if isinstance(self.physical, EncryptedPhysical):
            self.physical.executed(gfn)

    # ---- running
    def go(self) -> int:
        """Run until the VMM is needed: KVM_RUN's result with the exit written, or KICKED."""
        mmu, physical, registers, known = self.mmu, self.physical, self.registers, self.code.known
        words, modes, counters = registers.u64, registers.u32, self.stats.counters
        if self.hides_et:
            self.hides_et = self.intercepts is not None  # KVM sees CR0 as the processor has it, but of SEV-ES guests
        while True:
            if physical.generation != mmu.generation or physical.code_generation != self._code_generation:
                self.catch_up()
            if self.attention:
                result = self._attend()
                if result is not None:
                    return result
                if self.debug.active:
                    continue
            mmu.fault, self.event, self.stepped = None, -1, False
            error = self.native.start(words[_RIP])
            counters[EXITS] += 1
            stop = known.get(words[_RIP] if modes[_HFLAGS] & _CS64 else registers.place())
            if stop is None or error or self.event >= 0:
                result = self._stopped(error)
            else:
                try:
                    result = stop()
                except (Fault, Refused) as why:
                    result = self.privileged.operand_refused(why)
            if result is None and (self.kick[0] or self.page.memory[IMMEDIATE_EXIT]):
                result = KICKED  # a guest that is stopped again and again may never come to the next block
            if result is not None:
                if self.code.mixed:
                    self.code.look()
                return result

    def _attend(self) -> int | None:
        """Deliver events; while debugging, execute one instruction. KVM_RUN's result, KICKED, or None."""
        debug = self.debug
        if self.refuses_entry:
            return self.page.payload(kvm.KVM_EXIT_FAIL_ENTRY, "<QI", _INVALID_STATE, 0)
        result = debug.completed()
        if result is None:
            result = self.events.before_entry()
        if result is not None:
            return result
        if debug.active:
            self.attention = True
            if self.kick[0] or self.page.memory[IMMEDIATE_EXIT]:
                return KICKED
            return debug.step()
        return None

    def catch_up(self) -> None:
        """Drop translations that changes elsewhere made void."""
        physical = self.physical
        if self.mmu.catch_up():
            self.native.flush_tlb()
        if physical.code_generation != self._code_generation:  # behind the MMU: taking hooks away makes the engine fetch
            self._code_generation = physical.code_generation
            self.code.flush()

    def step(self, watch: Watch | None = None, *, flush: bool = True, system: bool = False) -> int:
        """Execute exactly one instruction (or one repetition); a UC_ERR_* number for `after_step`. Slow: for single
        steps and the like. The parameters are Stepper's.
        """
        self.mmu.fault, self.event = None, -1
        if hazards.aborts(self.code_here(), 0, self.registers.code_bits):
            self.event = _UD
            return uc.UC_ERR_OK
        error = self.stepper.run(watch, system=system)
        self.stepped = True
        if self.mmu.fault is None:
            self.stepper.commit(flush=flush)
        return error

    def try_step(self, watch: Watch, scratch_gpa: int) -> None:
        """The same with a scratch page at `scratch_gpa`, and nothing kept until `stepper.commit`."""
        self.mmu.fault, self.event, self.stepped = None, -1, True
        if hazards.aborts(self.code_here(), 0, self.registers.code_bits):  # it need not be the instruction that was tried before
            self.event = _UD
            return
        self.stepper.run(watch, scratch_gpa=scratch_gpa)

    def fault_address(self) -> int:
        """The address of the access that was refused last."""
        return self.stepper.fault_address() if self.stepped else self.mmu.fault_address()

    def after_step(self, error: int) -> int | None:
        """Deal with what a single step ran into; None when it was executed, or when the guest goes on in a handler."""
        if self.mmu.fault is not None:
            return self.refusals.deal(self.mmu.fault)
        if self.event >= 0:
            return self.exceptions.reported()
        if error in (uc.UC_ERR_INSN_INVALID, uc.UC_ERR_EXCEPTION):
            return self.exceptions.invalid_opcode()
        return None if error == uc.UC_ERR_OK else self.internal_error(f"the engine stopped with error {error}")

    def touches(self, where: int, size: int, linear: int, length: int) -> bool:
        """Does an access at engine-physical [where, where+size) meet guest-virtual [linear, linear+length)?"""
        try:
            gfn, encrypted, _ = self.mmu.translate(linear & -PAGE, False, False, False)
            window, offset, _ = self.physical.locate(gfn, encrypted, False)
        except (Fault, Refused):
            return False
        at = window.base + offset + (linear & (PAGE - 1))
        return where < at + length and at < where + size

    def code_here(self) -> bytes:
        """Up to 15 bytes at RIP, as far as they can be fetched."""
        rip = self.registers.linear_rip
        for size in (scan.MAX_LENGTH, min(scan.MAX_LENGTH, PAGE - (rip & (PAGE - 1)))):
            with contextlib.suppress(Fault, Refused):
                return self.mmu.read_code(rip, size)
        return b""

    def _stopped(self, error: int) -> int | None:
        """What to do about a stop: KVM_RUN's result, KICKED, or None to go on."""
        fault = self.mmu.fault if error != uc.UC_ERR_OK else None  # after a run the engine may look for code at exits: no access
        if fault is not None:
            return self.refusals.deal(fault)
        if self.event >= 0:
            return self.exceptions.reported()
        if error == uc.UC_ERR_OK:
            code, registers = self.code, self.registers
            rip = registers.linear_rip
            if rip in code.breakpoints:
                return self._at_breakpoint(rip)
            site = code.site(rip, registers.code_bits)
            if site is not None:
                code.remember(registers.place(), self.privileged.prepared(site))
                return self.privileged.execute(site)
            if self.kick[0] or self.page.memory[IMMEDIATE_EXIT]:
                return KICKED
            if code.stale:
                code.flush_blocks()
            elif code.hooked(rip):  # for what stood here before, or for code of another width
                return self.after_step(self.step())
            return None
        if error in (uc.UC_ERR_INSN_INVALID, uc.UC_ERR_EXCEPTION):
            return self.exceptions.invalid_opcode()
        return self.internal_error(f"the engine stopped with error {error}")

    def _at_breakpoint(self, rip: int) -> int | None:
        """An execution breakpoint of user space; with RFLAGS.RF set, the instruction is executed all the same."""
        hits = self.debug.hits(rip)
        if hits:
            return self.debug.strike(hits)
        site = self.code.site(rip, self.registers.code_bits)
        self.registers.set_flags(self.native.flags() & ~_RF)
        if site is not None:
            return self.privileged.execute(site)
        return self.after_step(self.step())
